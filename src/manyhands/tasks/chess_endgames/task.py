"""The chess endgames task: random positions with given pieces, exact truth, and a transformer that learns it.

`prepare` writes a record and the first weights, and links the Syzygy tables that are needed, so that a client needs
no directory of its own; `open` needs these materials and nothing else. Same plan, same tables: same bytes.

A sample is a number. Its position depends on the number, the set and the plan's seed alone (truth.py), so samples are
made when they are asked for, or ahead of time as shards, alike. Which positions are for validation is decided by the
position, not by the draw: those whose hash falls into the share `held_out`, mirror images alike. A drawn position of
the other set is drawn again. So nothing that is evaluated on, nor the mirror image of it, was ever trained on,
however many samples an epoch has, and whatever the seed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from manyhands.errors import DataError, PlanError
from manyhands.plan.chess_endgames import ChessEndgamesTask
from manyhands.plan.schema import Plan
from manyhands.tasks.chess_endgames.evaluation import EndgameMetrics, loss_of, outputs_of
from manyhands.tasks.chess_endgames.network import EndgameTransformer
from manyhands.tasks.chess_endgames.pieces import Specification, check_tables, needed_tables, parse
from manyhands.tasks.chess_endgames.positions import draw
from manyhands.tasks.chess_endgames.truth import PositionSource, open_source, place
from manyhands.tasks.first_weights import FIRST_WEIGHTS, write_first_weights
from manyhands.tasks.own_model import begun_model, load_model, opened_model, save_model
from manyhands.tasks.protocol import TRAINING, VALIDATION, Batch, Loss, Metrics, Prepared, Task

RECORD: Final = "endgames.json"
CONFIGURATION: Final = "config.json"

VALIDATION_SEED: Final = 0x76616C6964
"""Of the numbers of validation positions, in every plan: runs with other seeds are judged on the same ones."""
NEXT_DRAW: Final = 1 << 40
"""What is added to a sample's number when its position is one of the other set."""


class ChessEndgamesFamily:
    """How chess endgames are prepared and opened."""

    def prepare(self, plan: Plan, directory: Path) -> Prepared:
        """Raises DataError for pieces that are impossible, and for tables that are missing, by their names."""
        task = _settings(plan)
        specification = parse(task.pieces)
        directory.mkdir(parents=True, exist_ok=True)
        tables = [] if task.syzygy is None else _link_tables(specification, Path(task.syzygy), directory)
        open_source(task.pieces, directory if tables else None)
        _write_json(directory / RECORD, {"version": 1, "pieces": specification.text, "tables": tables})
        prepared = self.prepare_model(plan, directory)
        materials = {**prepared.materials, **{name: directory / name for name in tables}}
        return replace(prepared, materials=materials, samples=task.positions)

    def without_data(self, plan: Plan, materials: Path, directory: Path) -> None:  # noqa: ARG002 - as the protocol
        """The record alone: who reads positions from shards needs no tables."""
        shutil.copyfile(materials / RECORD, directory / RECORD)

    def prepare_model(self, plan: Plan, directory: Path) -> Prepared:
        """The first weights. Raises DataError for a record of other pieces."""
        task = _settings(plan)
        specification = parse(task.pieces)
        _read_record(task, specification, directory)
        sizes = _sizes(task, specification)
        model = begun_model(task, plan.seed, lambda: EndgameTransformer(**sizes), _kept, _by_setting(sizes))
        return Prepared(
            materials={RECORD: directory / RECORD},
            samples=0,
            parameters=write_first_weights(model, directory),
            first_weights=directory / FIRST_WEIGHTS,
        )

    def open(self, plan: Plan, materials: Path) -> Task:
        """The task over materials that `prepare` wrote. Raises DataError if they are not whole, or another plan's."""
        task = _settings(plan)
        tables = _read_record(task, parse(task.pieces), materials)
        return ChessEndgames(task, plan.seed, materials if tables else None)


FAMILY: Final = ChessEndgamesFamily()


@dataclass
class ChessEndgames:
    """An opened chess endgames task; implements tasks.protocol.Task. `tables`: where its Syzygy tables are."""

    settings: ChessEndgamesTask
    seed: int
    tables: Path | None
    unit: str = "positions"
    evaluation_sets: tuple[str, ...] = (VALIDATION,)

    @cached_property
    def specification(self) -> Specification:
        return parse(self.settings.pieces)

    @cached_property
    def source(self) -> PositionSource:
        """Opened when the first position is made: from shards, none is."""
        return open_source(self.settings.pieces, self.tables)

    def build_model(self) -> torch.nn.Module:
        """A new model in fp32 and training mode, on the CPU; its weights are overwritten before use."""
        return opened_model(self.settings, self._new_model)

    def _new_model(self) -> EndgameTransformer:
        return EndgameTransformer(**_sizes(self.settings, self.specification))

    def samples(self, split: str = TRAINING) -> int:
        return self.settings.positions if self._trains(split) else self.settings.validation_positions

    def tokens_per_sample(self) -> int:
        return 1

    def batch(self, indices: npt.NDArray[np.int64], split: str = TRAINING) -> Batch:
        """The record of truth.py, column by column."""
        total, trains = self.samples(split), self._trains(split)
        if indices.size and (indices.min() < 0 or indices.max() >= total):
            raise DataError(
                f"sample indices {indices.min()}..{indices.max()} do not lie within the {total} positions of "
                f"{split!r}: the assignment belongs to other data; compare the run's plan"
            )
        seed = self.seed if trains else VALIDATION_SEED
        rows = self.source.make(self._numbers(indices, seed, held_out=not trains), seed)
        return {name: torch.from_numpy(column) for name, column in rows.items()}

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        return loss_of(outputs_of(model, batch), batch, self.settings.loss)

    def metrics(self, split: str) -> Metrics:  # noqa: ARG002 - the same for all
        return EndgameMetrics(self, self.settings.loss)

    def save_pretrained(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """config.json and the weights, as `load_pretrained` reads them."""
        directory.mkdir(parents=True, exist_ok=True)
        sizes = _sizes(self.settings, self.specification)
        _write_json(
            directory / CONFIGURATION,
            {"task": self.settings.name, "pieces": self.specification.text, "model": sizes},
        )
        save_model(self.settings, self._new_model, weights, directory)

    def _trains(self, split: str) -> bool:
        if split not in (TRAINING, VALIDATION):
            raise DataError(f"there is no set {split!r} of positions; there are {TRAINING} and {VALIDATION}")
        return split == TRAINING

    def _numbers(self, indices: npt.NDArray[np.int64], seed: int, *, held_out: bool) -> npt.NDArray[np.int64]:
        """The source's numbers of these samples: each the first of index, index + NEXT_DRAW, ... of its set.

        It ends: any ending has thousands of positions, of which either set has a hundredth or more.
        """
        numbers = indices.astype(np.int64)
        waiting, drawn, ahead = np.arange(len(numbers)), 0, 1
        while waiting.size:
            tries = indices[waiting, None] + NEXT_DRAW * (drawn + np.arange(ahead))
            squares = np.zeros((tries.size, 64), dtype=np.uint8)
            for rows, men in draw(self.specification, tries.reshape(-1), seed):
                place(squares, rows, men)
            fits = (is_held_out(squares, self.settings.held_out) == held_out).reshape(tries.shape)
            found = fits.any(axis=1)
            numbers[waiting[found]] = tries[found, fits[found].argmax(axis=1)]
            waiting, drawn, ahead = waiting[~found], drawn + ahead, 8
        return numbers


def load_pretrained(directory: Path) -> EndgameTransformer:
    """The model that `save_pretrained` wrote, or a checkpoint holds, in evaluation mode. Raises DataError."""
    return load_model(directory, lambda place: EndgameTransformer(**_kept_sizes(place)), "chess endgames")


def _kept_sizes(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / CONFIGURATION).read_text(encoding="utf-8"))["model"])


def _kept(directory: Path) -> tuple[EndgameTransformer, dict[str, Any]]:
    return load_pretrained(directory), _by_setting(_kept_sizes(directory))


# ------------------------------------------------------------------------------------------ what is held out
_KEYS: Final = np.random.default_rng(64).integers(2**64, size=(13, 64), dtype=np.uint64)
_KEYS[0] = 0  # empty squares
_SQUARES: Final = np.arange(64)
_MIRRORED_KEYS: Final = _KEYS[:, _SQUARES ^ 7]


def is_held_out(squares: npt.NDArray[np.uint8], share: float) -> npt.NDArray[np.bool_]:
    """Which of the positions uint8 [N, 64] are for validation: about `share` of all, mirror images alike.

    By a hash of what stands where (Zobrist 1970), of the position and of its mirror image together.
    """
    one, other = (np.bitwise_xor.reduce(keys[squares, _SQUARES], axis=1) for keys in (_KEYS, _MIRRORED_KEYS))
    held: npt.NDArray[np.bool_] = ((one + other) >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share
    return held


# ------------------------------------------------------------------------------------------ settings and files
def _settings(plan: Plan) -> ChessEndgamesTask:
    if not isinstance(plan.task, ChessEndgamesTask):
        raise PlanError(f"task.name is {plan.task.name!r}, and this is the family of chess endgames")
    return plan.task


def _sizes(task: ChessEndgamesTask, specification: Specification) -> dict[str, Any]:
    sizes = task.model.model_dump()
    only_pieces = sizes.pop("tokens") == "pieces"
    return {**sizes, "pieces": max(e.men for e in specification.endings) if only_pieces else None}


def _by_setting(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Without the number of pieces, on which no weight depends."""
    return {f"task.model.{name}": value for name, value in sizes.items() if name != "pieces"}


def _read_record(task: ChessEndgamesTask, specification: Specification, materials: Path) -> list[str]:
    """The names of the tables among the materials. Raises DataError for another plan's materials, or broken ones."""
    try:
        record = json.loads((materials / RECORD).read_text(encoding="utf-8"))
        pieces, tables = str(record["pieces"]), list(record["tables"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"material {materials / RECORD}: {error}; prepare the task again, or fetch it again"
        ) from error
    if pieces != specification.text or bool(tables) != (task.syzygy is not None):
        raise DataError(
            f"material {materials / RECORD} is of the pieces {pieces}, with {len(tables)} tables; the plan has "
            f"{specification.text}: prepare the task again, or fetch it again"
        )
    return tables


def _link_tables(specification: Specification, source: Path, directory: Path) -> list[str]:
    """Links in `directory` to the tables that are needed: the larger ones take gigabytes."""
    source = source.expanduser().resolve()
    check_tables(specification.endings, source)
    names = sorted({name for ending in specification.endings for name in needed_tables(ending)})
    for name in names:
        link = directory / name
        link.unlink(missing_ok=True)
        link.symlink_to(source / name)
    return names


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
