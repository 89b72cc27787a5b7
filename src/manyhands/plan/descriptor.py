"""The run descriptor: what the server makes of a plan, once, and signs.

It names everything that a run's clients must agree on: the resolved plan and its hash, the first snapshot,
the materials (tokens, tokenizer, split: blobs) and the parameter table. Immutable: a run with another one is
another run.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from manyhands.config import Settings
from manyhands.plan.schema import Identifier, Plan

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DType = Literal["float32", "bfloat16", "float16"]


class Parameter(Settings):
    """One tensor of the model. Names are unique; `public` holds all of them as fp32 masters."""

    name: Annotated[str, Field(min_length=1, max_length=512)]
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    dtype: DType = "float32"
    """In which the model computes with it."""
    trainable: bool = True


class Material(Settings):
    """A file that work needs, as a blob: tokens, tokenizer, model configuration."""

    blob: Digest
    size_bytes: Annotated[int, Field(ge=0)]


class RunDescriptor(Settings):
    version: Literal[1] = 1
    run_id: Identifier
    plan: Plan
    plan_hash: Digest
    samples: Annotated[int, Field(ge=1)]
    """Training samples of one epoch; the coordinator hands out indices below it."""
    parameters: tuple[Parameter, ...]
    """In the order of the model; sorted by name where bytes are hashed."""
    materials: dict[str, Material]
    """By file name."""
    first_snapshot: Material
    first_fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]+$")]
    server_key: Digest
    """Ed25519 public key that signs this descriptor and every closing."""
