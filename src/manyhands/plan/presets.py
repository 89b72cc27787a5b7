"""Presets: named starting points, each a few values of a plan with the paper that they are from.

A preset's values lie under the plan's own: what the plan says wins. Values are as published; where the paper
tunes a value (inner learning rates above all) the one here is a start, not a recommendation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from manyhands.config import did_you_mean
from manyhands.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """`values`: a part of a plan, as plain data; `source`: where they come from."""

    summary: str
    source: str
    values: Mapping[str, Any]


# Plain SGD as FedAvg's family uses it: no momentum, no decay, no clipping. 0.1 is inside the range that the
# papers search; it needs tuning for each model.
_PLAIN_SGD: Final[Mapping[str, Any]] = {"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "clip_norm": 0.0}

PRESETS: Final[Mapping[str, Preset]] = {
    "fedsgd": Preset(
        summary="Clients send mean gradients; one AdamW on the server applies their mean.",
        source="Federated GPT2: gradients over 10 batches of 8, AdamW 1e-4 with its usual betas and decay",
        values={
            "local": {"kind": "gradient", "steps": 10, "batch_size": 8},
            "merge": {"weight": "samples"},
            "outer": {"name": "adamw", "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01},
        },
    ),
    "fedavg": Preset(
        summary="Local SGD steps; the mean of the clients' weights, by their samples.",
        source="McMahan et al. 2017, arXiv:1602.05629",
        values={
            "local": {"optimizer": _PLAIN_SGD},
            "merge": {"weight": "samples"},
            "outer": {"name": "sgd", "lr": 1.0},
        },
    ),
    "fedprox": Preset(
        summary="FedAvg with a proximal term that keeps clients near the shared weights.",
        source="Li et al. 2020, arXiv:1812.06127 (mu from {0.001, 0.01, 0.1, 1})",
        values={
            "local": {"optimizer": _PLAIN_SGD, "proximal": 0.01},
            "merge": {"weight": "samples"},
            "outer": {"name": "sgd", "lr": 1.0},
        },
    ),
    "scaffold": Preset(
        summary="Local SGD corrected by control variates, which travel as a second channel.",
        source="Karimireddy et al. 2020, arXiv:1910.06378 (option II, server learning rate 1)",
        values={
            "local": {"optimizer": _PLAIN_SGD, "control_variate": True},
            "merge": {"weight": "uniform"},
            "outer": {"name": "sgd", "lr": 1.0},
        },
    ),
    "fedadam": Preset(
        summary="Local SGD steps; their mean is a gradient for Adam without bias correction on the server.",
        source="Reddi et al. 2021, arXiv:2003.00295; FLamby's values (lr 0.01, betas .9 and .999, tau 1e-8)",
        values={
            "local": {"optimizer": {**_PLAIN_SGD, "lr": 0.01}},
            "merge": {"weight": "uniform"},
            "outer": {
                "name": "adamw",
                "lr": 0.01,
                "beta1": 0.9,
                "beta2": 0.999,
                "epsilon": 1e-8,
                "bias_correction": False,
            },
        },
    ),
    "diloco": Preset(
        summary=(
            "Hundreds of AdamW steps between exchanges; Nesterov momentum over rounds. An outer momentum of "
            "0.9 is for runs of hundreds of rounds: with 20 to 60 rounds 0.5 was better in our own small "
            "runs."
        ),
        source="Douillard et al. 2023, arXiv:2311.08105 (H 500, inner lr 4e-4, outer lr 0.7, momentum 0.9)",
        values={
            "local": {"steps": 500, "optimizer": {"name": "adamw", "lr": 4e-4, "weight_decay": 0.1}},
            "merge": {"weight": "uniform"},
            "outer": {"name": "nesterov", "lr": 0.7, "momentum": 0.9},
        },
    ),
}


def values_of(name: str) -> dict[str, Any]:
    """A copy of the preset's values. Raises PlanError, with the nearest name, when there is no such
    preset."""
    preset = PRESETS.get(name)
    if preset is None:
        raise PlanError(f"there is no preset '{name}'.{did_you_mean(name, PRESETS)}")
    return copy.deepcopy(dict(preset.values))
