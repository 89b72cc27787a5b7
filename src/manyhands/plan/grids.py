"""What a plan says about the task on coloured grids: where puzzles come from, how they are shown, the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from manyhands.config import LocalPath, Settings
from manyhands.plan.fine_tuning import FineTuned

Count = Annotated[int, Field(ge=1)]
GridRule = Literal["falling", "gravity", "lines", "mirror", "filter"]


class GeneratedGrids(Settings):
    """Puzzles made on the spot, each from the plan's seed, its set and its number alone."""

    rules: Annotated[tuple[GridRule, ...], Field(min_length=1)] = (
        "falling",
        "gravity",
        "lines",
        "mirror",
        "filter",
    )
    """Families of rules. falling: shapes fall to one side; gravity: a block attracts them; lines: cells send
    out lines; mirror: reflections and turns; filter: shapes stay or go by colour or size."""
    compositions: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of puzzles that apply one rule after another, of two different families."""
    puzzles: Count = 1000
    """Puzzles to train on."""
    evaluation_puzzles: Count = 200
    """Puzzles of a generated evaluation set."""
    examples: Annotated[int, Field(ge=2, le=10)] = 4
    """Pairs of a puzzle; in an evaluation the last is what is asked, the others are its context."""


class GridSet(Settings):
    """A named set of puzzles to evaluate on."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
    """What it is called in events and tables."""
    path: LocalPath
    """`generated`, or a directory of ARC's JSON files."""


class PixelModel(Settings):
    """The pixel transformer: pairs are encoded, the pixels of the test input ask what they become."""

    width: Count = 64
    """Width of its layers."""
    heads: Count = 4
    """Heads of attention; they divide the width."""
    encoder_layers: Count = 2
    """Layers over the pixels of each context pair."""
    decoder_layers: Count = 2
    """Layers over the pixels of the test input."""


class GridsTask(FineTuned):
    """Puzzles on coloured grids, as in ARC: some pairs show a rule, which is to be applied to another
    input."""

    name: Literal["grids"] = "grids"
    """grids: puzzles on coloured grids, from ARC's files or generated."""
    training: LocalPath = "generated"
    """Puzzles to train on: `generated`, or a directory of ARC's JSON files. Each pair is asked in turn."""
    evaluation: Annotated[tuple[GridSet, ...], Field(min_length=1)] = (
        GridSet(name="validation", path="generated"),
    )
    """Sets to evaluate on, the main one first, as in [{name: arc, path: DIR}]. Their test pairs are asked."""
    on_broken: Literal["stop", "skip"] = "stop"
    """What a broken file does: stop the preparation, or be left out, counted and recorded."""
    generated: GeneratedGrids = GeneratedGrids()
    """Puzzles made on the spot, where training or a set of evaluation says `generated`."""
    size: Annotated[int, Field(ge=6, le=30)] = 10
    """Rows and columns that every grid is padded to. Files with a larger grid are left out and counted."""
    context: Annotated[int, Field(ge=1, le=9)] = 3
    """Pairs that a sample shows at most."""
    variants: Count = 8
    """How often an epoch asks each training pair: once as it is, else turned or reflected and with its
    colours exchanged, by the plan's seed and the sample's number. 1: no augmentation."""
    model: PixelModel = PixelModel()
    """Size of the model."""
