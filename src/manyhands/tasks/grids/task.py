"""The grids task: pairs of coloured grids show a rule, which is to be applied to another input.

`prepare` runs once per run: it reads ARC's files or generates puzzles and writes the materials
(materials.py) and the first weights; `open` needs the materials and nothing else. Same plan, same files:
same bytes.

A sample asks one pair of a puzzle and shows others. In training each pair of a puzzle is asked in turn, and
an epoch has `variants` of each: sample i asks pair i mod n, as variant i div n. Variant 0 is the pair as it
is; the others are turned or reflected and have their colours exchanged (never the background, 0), the whole
sample alike, by (plan.seed, i) alone, so a batch is a function of its indices. In an evaluation the test pairs
are asked as they are, and the first pairs of the puzzle are shown.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from manyhands.errors import DataError, PlanError
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import GridsTask
from manyhands.tasks.first_weights import FIRST_WEIGHTS, write_first_weights
from manyhands.tasks.grids.generators import generate
from manyhands.tasks.grids.materials import (
    ORIGINS,
    RECORD,
    PuzzleArrays,
    keep_first_puzzle,
    names_of,
    open_arrays,
    read_record,
    write_arrays,
    write_records,
)
from manyhands.tasks.grids.metrics import GridMetrics, logits_of, loss_of
from manyhands.tasks.grids.model import PADDING, PixelTransformer
from manyhands.tasks.grids.puzzles import Puzzle, read_arc
from manyhands.tasks.grids.rules import Grid
from manyhands.tasks.own_model import begun_model, load_model, opened_model, save_model
from manyhands.tasks.protocol import TRAINING, Batch, Loss, Metrics, Prepared, Task

GENERATED: Final = "generated"
CONFIGURATION: Final = "config.json"
_NAMED: Final = 5
"""So many files are named in a warning; all are in the record."""


class GridsFamily:
    """How grids are prepared and opened."""

    def prepare(self, plan: Plan, directory: Path) -> Prepared:
        """Write materials and first weights into `directory`. Raises DataError for files that are broken or
        of no use, and for rules that do not fit into the grids.
        """
        task = _settings(plan)
        directory.mkdir(parents=True, exist_ok=True)
        sources = {TRAINING: task.training} | {s.name: s.path for s in task.evaluation}
        sets: dict[str, tuple[Puzzle, ...]] = {}
        records = []
        for group, (name, source) in enumerate(sources.items()):
            sets[name], record = _read(task, source, plan.seed, group)
            write_arrays(directory, name, sets[name], task.size)
            records.append({"name": name, "source": source, "puzzles": len(sets[name]), **record})
        write_records(directory, {"version": 1, "size": task.size, "sets": records}, sets)
        samples = task.variants * sum(len(puzzle.pairs) for puzzle in sets[TRAINING])
        return self._with_model(task, plan.seed, directory, tuple(sets), samples)

    def without_data(self, plan: Plan, materials: Path, directory: Path) -> None:
        """The records, and the first puzzle of each set."""
        for file in (RECORD, ORIGINS):
            shutil.copyfile(materials / file, directory / file)
        for part in read_record(materials)["sets"]:
            keep_first_puzzle(materials, directory, part["name"], _settings(plan).size)

    def prepare_model(self, plan: Plan, directory: Path) -> Prepared:
        """Another model over the same puzzles. Raises DataError, PlanError."""
        names = tuple(part["name"] for part in read_record(directory)["sets"])
        return self._with_model(_settings(plan), plan.seed, directory, names, 0)

    def _with_model(
        self, task: GridsTask, seed: int, directory: Path, sets: tuple[str, ...], samples: int
    ) -> Prepared:
        model = begun_model(task, seed, lambda: _model(task), _kept, _by_setting(_sizes(task)))
        names = [RECORD, ORIGINS, *(file for name in sets for file in names_of(name))]
        return Prepared(
            materials={name: directory / name for name in names},
            samples=samples,
            parameters=write_first_weights(model, directory),
            first_weights=directory / FIRST_WEIGHTS,
        )

    def open(self, plan: Plan, materials: Path) -> Task:
        """The task over materials that `prepare` wrote. Raises DataError if one is missing or not whole."""
        settings = _settings(plan)
        record = read_record(materials)
        names = [part["name"] for part in record["sets"]]
        if record["size"] != settings.size or names != [TRAINING, *(s.name for s in settings.evaluation)]:
            raise DataError(
                f"material {materials / RECORD}: size {record['size']} and sets {', '.join(names)} are not "
                "those of the plan; prepare the task again, or fetch it again"
            )
        return Grids(
            settings=settings,
            seed=plan.seed,
            sets={name: _Asked.of(open_arrays(materials, name, settings.size), name) for name in names},
            evaluation_sets=tuple(names[1:]),
            warnings=_left_out(record),
        )


FAMILY: Final = GridsFamily()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A set of puzzles and what is asked of it, in order: int64 [n, 2] of puzzle and pair."""

    arrays: PuzzleArrays
    asked: npt.NDArray[np.int64]

    @classmethod
    def of(cls, arrays: PuzzleArrays, name: str) -> _Asked:
        first, pairs, tests = arrays.puzzles.astype(np.int64).T
        count = pairs if name == TRAINING else tests
        puzzle = np.repeat(np.arange(len(count)), count)
        nth = np.arange(len(puzzle)) - np.repeat(np.cumsum(count) - count, count)
        return cls(arrays=arrays, asked=np.stack([puzzle, (first + pairs - count)[puzzle] + nth], axis=1))


@dataclass(slots=True, kw_only=True)
class Grids:
    """An opened grids task; implements tasks.protocol.Task."""

    settings: GridsTask
    seed: int
    sets: Mapping[str, _Asked]
    evaluation_sets: tuple[str, ...]
    warnings: tuple[str, ...] = ()  # implements Warns too
    unit: str = "pixels"

    def build_model(self) -> torch.nn.Module:
        """A new model in fp32 and training mode, on the CPU; its weights are overwritten before use."""
        return opened_model(self.settings, lambda: _model(self.settings))

    def samples(self, split: str = TRAINING) -> int:
        return len(self._set(split).asked) * (self.settings.variants if split == TRAINING else 1)

    def tokens_per_sample(self) -> int:
        """Pixels of a padded grid: so many are predicted."""
        return self.settings.size**2

    def batch(self, indices: npt.NDArray[np.int64], split: str = TRAINING) -> Batch:
        """int64 "inputs" and "targets" [B, S, S], "context_inputs" and "context_outputs" [B, C, S, S], bool
        "context_mask" [B, C], and int64 "sample" and "puzzle" [B]. Grids are padded with 10.
        """
        part, total = self._set(split), self.samples(split)
        if indices.size and (indices.min() < 0 or indices.max() >= total):
            raise DataError(
                f"sample indices {indices.min()}..{indices.max()} do not lie within the {total} samples of "
                f"{split!r}: the assignment belongs to other data; compare the run's materials"
            )
        cells = np.full(
            (len(indices), 1 + self.settings.context, 2, self.settings.size, self.settings.size),
            PADDING,
            dtype=np.int64,
        )
        mask = np.zeros((len(indices), self.settings.context), dtype=bool)
        for row, index in enumerate(indices.tolist()):
            shown = self._fill(cells[row], part, index)
            mask[row, :shown] = True
        inputs, outputs = torch.from_numpy(cells).unbind(2)
        return {
            "inputs": inputs[:, 0].contiguous(),
            "targets": outputs[:, 0].contiguous(),
            "context_inputs": inputs[:, 1:].contiguous(),
            "context_outputs": outputs[:, 1:].contiguous(),
            "context_mask": torch.from_numpy(mask),
            "sample": torch.from_numpy(indices.astype(np.int64)),
            "puzzle": torch.from_numpy(part.asked[indices % len(part.asked), 0]),
        }

    def _fill(self, cells: npt.NDArray[np.int64], part: _Asked, index: int) -> int:
        """Write a sample into `cells` [1 + C, 2, S, S], the asked pair first; how many others it shows."""
        variant, place = divmod(index, len(part.asked))
        puzzle, asked = part.asked[place].tolist()
        first, pairs, tests = part.arrays.puzzles[puzzle].tolist()
        known = range(first, first + pairs - (0 if part is self.sets[TRAINING] else tests))
        others = np.array([pair for pair in known if pair != asked])
        generator = np.random.default_rng([self.seed, index]) if variant else None
        if generator is not None:
            others = generator.permutation(others)
        others = others[: self.settings.context]
        change = _Change.drawn(generator)
        for slot, pair in enumerate((asked, *others.tolist())):
            for side in (0, 1):
                grid = change(part.arrays.grid(pair, side))
                cells[slot, side, : grid.shape[0], : grid.shape[1]] = grid
        return len(others)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Mean cross-entropy in nats over all S * S pixels of the outputs, padding included, in fp32."""
        return loss_of(logits_of(model, batch), batch)

    def metrics(self, split: str) -> Metrics:  # noqa: ARG002 - the same for all
        return GridMetrics(self)

    def save_pretrained(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """config.json and the weights, as `load_pretrained` reads them."""
        directory.mkdir(parents=True, exist_ok=True)
        configuration = {"task": "grids", "context": self.settings.context, "model": _sizes(self.settings)}
        text = json.dumps(configuration, indent=1, sort_keys=True) + "\n"
        (directory / CONFIGURATION).write_text(text, encoding="utf-8")
        save_model(self.settings, lambda: _model(self.settings), weights, directory)

    def _set(self, split: str) -> _Asked:
        found = self.sets.get(split)
        if found is None:
            raise DataError(f"there is no set {split!r} of puzzles; there are {', '.join(self.sets)}")
        return found


@dataclass(frozen=True, slots=True)
class _Change:
    """A symmetry of the square and an exchange of colours, for all grids of a sample alike."""

    turns: int  # by 90 degrees
    reflected: bool
    colours: npt.NDArray[np.uint8]  # [10], what each becomes

    @classmethod
    def drawn(cls, generator: np.random.Generator | None) -> _Change:
        """None: no change."""
        if generator is None:
            return cls(0, False, np.arange(10, dtype=np.uint8))
        symmetry = int(generator.integers(8))
        colours = np.concatenate([[0], 1 + generator.permutation(9)]).astype(np.uint8)
        return cls(symmetry % 4, symmetry >= 4, colours)

    def __call__(self, grid: Grid) -> Grid:
        return self.colours[np.rot90(grid.T if self.reflected else grid, self.turns)]


def load_pretrained(directory: Path) -> PixelTransformer:
    """The model that `save_pretrained` wrote, or a checkpoint holds, in evaluation mode. Raises DataError."""
    return load_model(directory, lambda place: PixelTransformer(**_kept_sizes(place)), "the grids task")


def _kept_sizes(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / CONFIGURATION).read_text(encoding="utf-8"))["model"])


def _kept(directory: Path) -> tuple[PixelTransformer, dict[str, Any]]:
    return load_pretrained(directory), _by_setting(_kept_sizes(directory))


def _left_out(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence for each set of which files are not used."""
    sentences = []
    for part in record["sets"]:
        ways = {"broken": part.get("broken", ()), f"larger than {record['size']}": part.get("too_large", ())}
        for way, files in ways.items():
            if files:
                named = ", ".join([*files][:_NAMED]) + (", ..." if len(files) > _NAMED else "")
                sentences.append(f"{part['name']}: {len(files)} files are left out as {way}: {named}")
    return tuple(sentences)


def _settings(plan: Plan) -> GridsTask:
    if not isinstance(plan.task, GridsTask):
        raise PlanError(f"task.name is {plan.task.name!r}, and this is the family of grids")
    return plan.task


def _sizes(task: GridsTask) -> dict[str, int]:
    return {"size": task.size, **task.model.model_dump()}


def _by_setting(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {"task.size" if name == "size" else f"task.model.{name}": value for name, value in sizes.items()}


def _model(task: GridsTask) -> PixelTransformer:
    return PixelTransformer(**_sizes(task))


def _read(task: GridsTask, source: str, seed: int, group: int) -> tuple[tuple[Puzzle, ...], dict[str, Any]]:
    """The puzzles of a source, and what the record says of it."""
    if source != GENERATED:
        files = read_arc(Path(source).expanduser(), task.size, task.on_broken)
        return files.puzzles, {"broken": dict(files.broken), "too_large": list(files.too_large)}
    count = task.generated.evaluation_puzzles if group else task.generated.puzzles
    return tuple(generate(task.generated, task.size, seed, group, i) for i in range(count)), {}
