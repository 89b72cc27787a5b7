"""The aggregator of a star: merges updates as they come, advances `public`, and survives a kill at any point.

`public` and the outer state are files, mapped: two of each, of which `state.json` names the valid ones. A round
writes the other ones, makes them durable, and then replaces `state.json`: that is the commit point. What a crash
leaves before it is written over; after it, `advance` of the same closing gives the recorded result again. Sums are
in memory only: after a restart the round's updates are merged anew, with the same bits.

The directory belongs to one run, and what it holds is compared with what the coordinator knows: a directory that was
lost, exchanged or restored from an old backup is refused, since going on from it would change the run in silence.

Not for several threads at once. One aggregation per directory; the caller holds its lock.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from manyhands.coordination.types import Closing
from manyhands.errors import StorageError, UpdateError
from manyhands.plan import wire
from manyhands.plan.compatibility import check
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.storage.durable import write_whole
from manyhands.updates import snapshots, tensorfile
from manyhands.updates.functions import clients_of
from manyhands.updates.merge import Merger
from manyhands.updates.outer import advance_arrays
from manyhands.updates.tensorfile import TensorFile

STATE = "state.json"
_TELL = "Restore this directory as it was, or start a new run."


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What is valid in the directory. `slot` 0 or 1 names the files; `counted` are the last closing's."""

    run_id: str
    plan_hash: str
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

    Raises PlanError, UpdateError (the first snapshot does not fit) or StorageError (among others, when the directory
    is that of another run).
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Sequence[Parameter],
        directory: Path,
        first_public: Path,
        *,
        run_id: str = "",
        plan_hash: str = "",
        threads: int | None = None,
    ) -> None:
        check(plan)
        self._plan, self._parameters, self._directory, self._threads = plan, parameters, directory, threads
        self._merger = Merger(plan, parameters, threads=threads)
        self._added: list[_Added] = []
        directory.mkdir(parents=True, exist_ok=True)
        state = self._recorded()
        if state is None:
            fingerprint = self._fill(0, first_public)
            state = _State(run_id=run_id, plan_hash=plan_hash, round=0, slot=0, fingerprint=fingerprint)
            self._commit(state)
        elif (state.run_id, state.plan_hash) != (run_id, plan_hash):
            raise StorageError(
                f"{directory} holds run '{state.run_id}' of plan {state.plan_hash[:16]}...; expected run '{run_id}' "
                f"of plan {plan_hash[:16]}...: restore this run's directory, or start a new run"
            )
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

    def stand_at(
        self,
        round_number: int,
        fingerprint: str | None,
        *,
        closing: Closing | None = None,
        snapshot: Path | None = None,
    ) -> None:
        """After a start: see that this is where the coordinator is, or raise StorageError.

        `public` must have `fingerprint` after `round_number` closings. `closing`: of that round, where it is closed
        and not yet recorded as advanced; then it may have been applied here already. `snapshot`: of `public` at
        `round_number`; a directory that is behind starts from it if the outer optimizer keeps no state.
        """
        found = snapshots.fingerprint_of(self._public.arrays, threads=self._threads).hex
        if found != self.fingerprint:
            raise StorageError(
                f"public in {self._directory} has the fingerprint {found[:16]}..., its {STATE} says "
                f"{self.fingerprint[:16]}...: the files are damaged. {_TELL}"
            )
        if (
            closing is not None
            and self.round == round_number + 1
            and _counted(closing) == self._state.counted
        ):
            return
        if self.round > round_number:
            raise self._elsewhere(round_number, fingerprint)
        behind = self.round < round_number and self.fingerprint != fingerprint
        if behind and snapshot is not None and not wire.outer_schema(self._plan, self._parameters):
            self._start_from(snapshot, round_number, fingerprint)
        self.move_on(round_number, fingerprint)

    def move_on(self, round_number: int, fingerprint: str | None) -> None:
        """`public` has `fingerprint` after `round_number` closings: so the coordinator says, and so it must be here.

        Closings before that were not advanced here counted nothing: `public` is what it was, and what was merged
        meanwhile is forgotten. Raises StorageError where the fingerprint is another one: then closings that did
        count are missing here. Nothing happens when the aggregator is further already.
        """
        if round_number < self.round:
            return
        if fingerprint != self.fingerprint:
            raise self._elsewhere(round_number, fingerprint)
        if round_number > self.round:
            self._commit(replace(self._state, round=round_number, change=False, counted=()))
            self.restart_round()

    def _elsewhere(self, round_number: int, fingerprint: str | None) -> StorageError:
        expected = "unknown" if fingerprint is None else f"{fingerprint[:16]}..."
        return StorageError(
            f"the run is at round {round_number} with the fingerprint {expected}; {self._directory} is at round "
            f"{self.round} with {self.fingerprint[:16]}...: it was lost, exchanged, or is an old copy. {_TELL}"
        )

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
            replace(
                self._state,
                round=closing.round + 1,
                slot=slot,
                fingerprint=fingerprint,
                change=bool(counted),
                counted=counted,
            )
        )
        self.restart_round()
        if counted:
            self._reopen()
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

    def _start_from(self, snapshot: Path, round_number: int, fingerprint: str | None) -> None:
        """`public` from a snapshot, if it is the right one; nothing of what was here is left then."""
        slot = 1 - self._state.slot
        found = self._fill(slot, snapshot)
        if found != fingerprint:
            return
        self._commit(
            replace(
                self._state,
                round=round_number,
                slot=slot,
                fingerprint=found,
                change=False,
                counted=(),
            )
        )
        self.restart_round()
        self._reopen()

    def _fill(self, slot: int, snapshot: Path) -> str:
        """A slot from a snapshot and outer state of zeros, durable; the fingerprint."""
        first = snapshots.load_arrays(snapshot, self._plan, self._parameters)
        with (
            tensorfile.create(
                self._slot("public", slot), wire.snapshot_schema(self._plan, self._parameters)
            ) as public,
            tensorfile.create(
                self._slot("outer", slot), wire.outer_schema(self._plan, self._parameters)
            ) as outer,
        ):
            for name, array in public.arrays.items():
                np.copyto(array, first[name])
            for array in outer.arrays.values():
                array.fill(0)
            tensorfile.flush_all(public, outer)
            return snapshots.fingerprint_of(public.arrays, threads=self._threads).hex

    def _reopen(self) -> None:
        self._public.close()
        self._outer.close()
        self._open_slot()

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
        write_whole(
            self._directory / STATE, json.dumps({name: getattr(state, name) for name in _State.__slots__})
        )
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
