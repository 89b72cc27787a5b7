"""The aggregator of a star: merges updates as they come, advances `public`, and survives a kill at any point.

`public` and the outer state are files, mapped: two of each, of which `state.json` names the valid ones. A round
writes the other ones, makes them durable, and then replaces `state.json`: that is the commit point. What a crash
leaves before it is written over; after it, `advance` of the same closing gives the recorded result again. Sums are
in memory only: after a restart the round's updates are merged anew, with the same bits.

Not for several threads at once. One aggregation per directory; the caller holds its lock.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manyhands.coordination.types import Closing
from manyhands.errors import StorageError, UpdateError
from manyhands.plan import wire
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.updates import snapshots, tensorfile
from manyhands.updates.functions import check_supported, clients_of
from manyhands.updates.merge import Merger
from manyhands.updates.outer import advance_arrays
from manyhands.updates.tensorfile import TensorFile

STATE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What is valid in the directory. `slot` 0 or 1 names the files; `counted` are the last closing's."""

    round: int
    slot: int
    fingerprint: str
    change: bool = False  # whether the last closing made a change
    counted: tuple[tuple[str, int, str], ...] = ()  # assignment, weight, factor as float.hex


@dataclass(frozen=True, slots=True, kw_only=True)
class _Added:
    assignment: str
    weight: int
    factor: float
    norm: float


class Aggregation:
    """Merges and advances one run in `directory`; starts from `first_public`, or goes on from what was committed.

    Raises PlanError, UpdateError (the first snapshot does not fit) or StorageError.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Sequence[Parameter],
        directory: Path,
        first_public: Path,
        *,
        threads: int | None = None,
    ) -> None:
        check_supported(plan)
        self._plan, self._parameters, self._directory, self._threads = plan, parameters, directory, threads
        self._merger = Merger(plan, parameters, threads=threads)
        self._added: list[_Added] = []
        directory.mkdir(parents=True, exist_ok=True)
        state = self._recorded()
        if state is None:
            state = self._begin(first_public)
        self._state = state
        self._open_slot()

    @property
    def round(self) -> int:
        """Closings that `public` has seen."""
        return self._state.round

    @property
    def fingerprint(self) -> str:
        return self._state.fingerprint

    @property
    def merged(self) -> tuple[str, ...]:
        """Assignments whose updates are in the sum, in order."""
        return tuple(added.assignment for added in self._added)

    def merge(
        self,
        assignment: str,
        path: Path,
        *,
        round_number: int,
        weight: int,
        norm: float | None,
        factor: float = 1.0,
    ) -> float:
        """Check an update and add it to the round's sum; its norm. UpdateError, and then nothing was added.

        Repeated for the same assignment it adds nothing and gives the same answer.
        """
        if round_number != self.round:
            raise UpdateError(
                f"assignment {assignment} is of round {round_number}; the aggregator is merging round {self.round}"
            )
        for added in self._added:
            if added.assignment == assignment:
                if (added.weight, added.factor) != (weight, factor):
                    raise UpdateError(
                        f"assignment {assignment} was added with weight {added.weight} and factor {added.factor}; "
                        f"now {weight} and {factor} are asked for: call restart_round and merge again"
                    )
                return added.norm
        found = self._merger.check(path, norm)
        self._merger.add(path, weight, factor)
        self._added.append(_Added(assignment=assignment, weight=weight, factor=factor, norm=found))
        return found

    def move_on(self, round_number: int) -> None:
        """The closings before `round_number` that were not advanced counted nothing: `public` is what it was.

        What was merged meanwhile is forgotten. Nothing happens when the aggregator is there already, or further.
        """
        if round_number > self.round:
            state = self._state
            self._commit(_State(round=round_number, slot=state.slot, fingerprint=state.fingerprint))
            self.restart_round()

    def restart_round(self) -> None:
        """Forget the sum: the round's updates are to be merged anew."""
        self._merger.clear()
        self._added = []

    def advance(self, closing: Closing, change_path: Path) -> str:
        """Apply a closing: `public` and `outer` durable, the encoded change at `change_path`; the fingerprint.

        What was merged must be what the closing counts, in its order. The same closing again gives the recorded
        result. A closing that counts nothing makes no change file. Raises UpdateError, and then the sum is as it
        was; or StorageError, and then the sum is empty and the round's updates are to be merged again.
        """
        if closing.round == self.round - 1:
            return self._again(closing, change_path)
        if closing.round != self.round:
            raise UpdateError(
                f"the closing is of round {closing.round}; the aggregator is at round {self.round}"
            )
        counted = _counted(closing)
        if counted != tuple((a.assignment, a.weight, a.factor.hex()) for a in self._added):
            raise UpdateError(
                f"the closing of round {closing.round} counts {[c[0] for c in counted]} but the sum holds "
                f"{list(self.merged)}, or other weights: call restart_round and merge what it counts, in its order"
            )
        fingerprint = self._apply(closing, change_path) if counted else self.fingerprint
        slot = 1 - self._state.slot if counted else self._state.slot
        self._commit(
            _State(
                round=closing.round + 1,
                slot=slot,
                fingerprint=fingerprint,
                change=bool(counted),
                counted=counted,
            )
        )
        self.restart_round()
        if counted:
            self._public.close()
            self._outer.close()
            self._open_slot()
            self._forget_changes(closing.round)
        return fingerprint

    def snapshot(self, path: Path) -> str:
        """Write `public` as a file; its fingerprint."""
        snapshots.save_arrays(self._public.arrays, path)
        return self.fingerprint

    def close(self) -> None:
        """Let go of the files."""
        self._merger.close()
        self._public.close()
        self._outer.close()

    def _apply(self, closing: Closing, change_path: Path) -> str:
        """Fill the other slot and the change file, all durable; the new fingerprint."""
        plan, parameters, slot = self._plan, self._parameters, 1 - self._state.slot
        merged = self._merger.merged(clients=clients_of(closing))
        change_file = self._change_file(closing.round)
        try:
            with (
                tensorfile.create(
                    self._slot("public", slot), wire.snapshot_schema(plan, parameters)
                ) as public,
                tensorfile.create(self._slot("outer", slot), wire.outer_schema(plan, parameters)) as outer,
                tensorfile.create(_aside(change_file), wire.change_schema(plan, parameters)) as change,
            ):
                advance_arrays(
                    plan,
                    parameters,
                    closing.outer,
                    merged=merged,
                    public=self._public.arrays,
                    outer=self._outer.arrays,
                    change_out=change.arrays,
                    outer_out=outer.arrays,
                    public_out=public.arrays,
                    threads=self._threads,
                )
                tensorfile.flush_all(public, outer, change)
                fingerprint = snapshots.fingerprint_of(public.arrays, threads=self._threads).hex
            tensorfile.publish(_aside(change_file), change_file)
            _hand_out(change_file, change_path)
        except BaseException:
            self.restart_round()  # the sums have been divided
            raise
        return fingerprint

    def _again(self, closing: Closing, change_path: Path) -> str:
        if _counted(closing) != self._state.counted:
            raise UpdateError(
                f"round {closing.round} was closed with {[c[0] for c in self._state.counted]}, and a closing does "
                f"not change; now {[c.assignment for c in closing.counted]} are given"
            )
        if self._state.change:
            _hand_out(self._change_file(closing.round), change_path)
        return self.fingerprint

    def _begin(self, first_public: Path) -> _State:
        """Slot 0 from the first snapshot and outer state of zeros."""
        first = snapshots.load_arrays(first_public, self._plan, self._parameters)
        with (
            tensorfile.create(
                self._slot("public", 0), wire.snapshot_schema(self._plan, self._parameters)
            ) as public,
            tensorfile.create(
                self._slot("outer", 0), wire.outer_schema(self._plan, self._parameters)
            ) as outer,
        ):
            for name, array in public.arrays.items():
                np.copyto(array, first[name])
            for array in outer.arrays.values():
                array.fill(0)
            tensorfile.flush_all(public, outer)
            fingerprint = snapshots.fingerprint_of(public.arrays, threads=self._threads).hex
        state = _State(round=0, slot=0, fingerprint=fingerprint)
        self._commit(state)
        return state

    def _open_slot(self) -> None:
        plan, parameters, slot = self._plan, self._parameters, self._state.slot
        self._public: TensorFile = tensorfile.open_own(
            self._slot("public", slot), wire.snapshot_schema(plan, parameters)
        )
        self._outer: TensorFile = tensorfile.open_own(
            self._slot("outer", slot), wire.outer_schema(plan, parameters)
        )

    def _commit(self, state: _State) -> None:
        """The commit point."""
        aside = _aside(self._directory / STATE)
        with aside.open("w", encoding="utf-8") as file:
            json.dump({name: getattr(state, name) for name in _State.__slots__}, file)
            file.flush()
            os.fsync(file.fileno())
        tensorfile.publish(aside, self._directory / STATE)
        self._state = state

    def _recorded(self) -> _State | None:
        path = self._directory / STATE
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            counted = tuple((str(a), int(w), str(f)) for a, w, f in fields.pop("counted"))
            return _State(**fields, counted=counted)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StorageError(
                f"{path} is not an aggregator's state ({error}); restore it from a backup"
            ) from None

    def _slot(self, what: str, slot: int) -> Path:
        return self._directory / f"{what}-{slot}.safetensors"

    def _change_file(self, round_number: int) -> Path:
        return self._directory / f"change-{round_number}.safetensors"

    def _forget_changes(self, keep: int) -> None:
        """Only the last round's change can still be asked for."""
        for path in self._directory.glob("change-*.safetensors"):
            if path != self._change_file(keep):
                path.unlink(missing_ok=True)


def _counted(closing: Closing) -> tuple[tuple[str, int, str], ...]:
    return tuple((c.assignment, c.weight, c.factor.hex()) for c in closing.counted)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _hand_out(change: Path, path: Path) -> None:
    """The change under the caller's name: another link, or a copy on another file system."""
    if path.exists() and path.samefile(change):
        return
    aside = _aside(path)
    aside.unlink(missing_ok=True)
    try:
        os.link(change, aside)
    except OSError:
        shutil.copyfile(change, aside)
    os.replace(aside, path)
