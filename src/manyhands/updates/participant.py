"""A client's side of a run: does assignments, applies closings, keeps local state. Around the five functions.

Used by a client's worker process and by simulation. Not for several threads. With `torch_free` tensors are numpy
arrays throughout and torch is never loaded: for work without a model.

A star's client applies the change that the aggregator published; a mesh's client merges the counted updates and
advances itself. Either way `public` gets the same bits, and `close` returns their fingerprint; in a mesh also that
of `outer`. In a mesh nobody can object any more once a closing is there: what cannot be merged, although a quorum has
agreed on it, everybody leaves out alike, by checks that are exact.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from manyhands.coordination.effects import Closed
from manyhands.coordination.types import Assignment, Claims, Closing, Held, RoundTerms
from manyhands.errors import UpdateError
from manyhands.plan import wire
from manyhands.plan.compatibility import check
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.updates import functions, localfile, snapshots, tensorfile
from manyhands.updates.checks import Unsound, check_update
from manyhands.updates.merge import Merger
from manyhands.updates.seeds import seed_generators
from manyhands.updates.types import Local, Outer, Public, Trainer
from manyhands.updates.views import as_arrays, as_tensors


class Participant:
    """One client of one run. `trainer` may be None for one that never works: an observer.

    `micro_batch` (0: all of a step at once), `data_parallelism`, `tensor_parallelism` and `device` are what the
    trainer uses, for the claims. `round` counts the closings that `public` has seen. Raises PlanError for plans that
    are not carried out yet.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Sequence[Parameter],
        trainer: Trainer | None,
        public: Public,
        *,
        outer: Outer | None = None,
        local: Local | None = None,
        round_number: int = 0,
        torch_free: bool = False,
        device: str = "cpu",
        micro_batch: int = 0,
        data_parallelism: int = 1,
        tensor_parallelism: int = 1,
    ) -> None:
        check(plan)
        self._plan, self._parameters, self._trainer = plan, parameters, trainer
        self._torch_free, self._device, self._micro_batch = torch_free, device, micro_batch
        self._data_parallelism, self._tensor_parallelism = data_parallelism, tensor_parallelism
        self._public = _expected(snapshots.public_arrays(public), plan, parameters)
        self._outer = outer or Outer()
        self._merger: Merger | None = None
        self.local = local or Local()
        self.round = round_number

    @property
    def public(self) -> Public:
        """Weights and control variate as they are now; shared, so not to be written."""
        public = snapshots.public_of(self._public)
        if self._torch_free:
            return public
        control = None if public.control is None else as_tensors(as_arrays(public.control))
        return Public(weights=as_tensors(as_arrays(public.weights)), control=control)

    @property
    def outer(self) -> Outer:
        """The outer optimizer's state: in a mesh alike everywhere, in a star empty."""
        return self._outer

    def held(self) -> Held:
        """The fingerprints of `public` and, in a mesh, of `outer`."""
        return snapshots.held_by(self._arrays())

    def work(self, assignment: Assignment, terms: RoundTerms, path: Path) -> Claims:
        """Do an assignment and write the update to `path`. If it raises, neither file nor local state is new.

        Seeds the global random generators from the assignment.
        """
        if self._trainer is None:
            raise UpdateError(
                f"assignment {assignment.id} is for a participant without a trainer: it only watches"
            )
        seed_generators(assignment.seed, torch_free=self._torch_free)
        started = time.monotonic()
        update, local = functions.work(
            self.public,
            self.local,
            assignment,
            terms,
            plan=self._plan,
            parameters=self._parameters,
            trainer=self._trainer,
        )
        work_ms = round((time.monotonic() - started) * 1000)
        schema = wire.update_schema(self._plan, self._parameters)
        with tensorfile.written(
            path, schema, durable=False
        ) as out:  # it counts once the server has stored it
            for name, array in update.tensors.items():
                np.copyto(out[name], array)
        self.local = local
        return Claims(
            norm=update.norm,
            loss=update.loss,
            tokens=update.tokens,
            samples=update.samples,
            work_ms=work_ms,
            start=update.start,
            threads=_threads(self._torch_free),
            micro_batch=self._micro_batch,
            data_parallelism=self._data_parallelism,
            tensor_parallelism=self._tensor_parallelism,
            device=self._device,
        )

    def check(self, update_path: Path, claimed_norm: float) -> float:
        """Check an update as a witness: header, values, norm. Its norm; UpdateError says what is wrong."""
        return check_update(self._plan, self._parameters, update_path, claimed_norm)

    def close(
        self, closing: Closing, *, change_path: Path | None = None, update_paths: Sequence[Path] | None = None
    ) -> Held:
        """Apply a closing and adopt it; the fingerprints of what is held afterwards.

        Star: `change_path` is the published change. Mesh: `update_paths` are the counted updates, in the closing's
        order. Neither where nothing counted. If it raises, nothing has changed.
        """
        if closing.round != self.round:
            raise UpdateError(
                f"the closing is of round {closing.round}; expected {self.round}, the next one to apply"
            )
        public, outer = self._public, self._outer
        if closing.counted and self._plan.topology == "star":
            if change_path is None:
                raise UpdateError(
                    f"the closing of round {closing.round} has counted updates but comes without a change"
                )
            public = self._applied(change_path)
        elif closing.counted:
            public, outer = self._merged(closing, update_paths or ())
        self.local = functions.adopt(snapshots.public_of(public), self.local, closing, plan=self._plan)
        self._public, self._outer = public, outer
        self.round += 1
        return self.held()

    def close_with(self, closed: Closed, payloads: Sequence[Path]) -> Held:
        """`close` of what was published: `payloads` are the files of `closed.payloads`, in that order."""
        if closed.change is not None:
            (change,) = payloads
            return self.close(closed.closing, change_path=change)
        return self.close(closed.closing, update_paths=payloads)

    def settle(self, closings: Sequence[Closing]) -> None:
        """Settle what is pending of rounds that `public` has seen already: after a restart from a snapshot."""
        for closing in closings:
            self.local = functions.adopt(self.public, self.local, closing, plan=self._plan)

    def save_local(self, path: Path) -> None:
        """Local state, in one file that is never seen half-written."""
        localfile.save_local(self.local, path)

    def load_local(self, path: Path) -> None:
        """Raises StorageError when the file is not the local state of this run; the old state stays."""
        self.local = localfile.load_local(path, self._parameters, arrays=self._torch_free)

    def save_public(self, path: Path) -> Held:
        """A snapshot: `public`, in a mesh with `outer`; its fingerprints. Equal states give equal bytes."""
        snapshots.save_arrays(self._arrays(), path)
        return self.held()

    def load_public(self, path: Path, round_number: int, expected: Held) -> None:
        """Go on from a snapshot taken after `round_number` closings; local state stays: `settle` it.

        Raises UpdateError when the file is no snapshot of this plan or does not hold what is expected; then nothing
        has changed.
        """
        arrays = snapshots.load_held(path, self._plan, self._parameters, expected)
        self._public = snapshots.public_arrays(snapshots.public_of(arrays))
        self._outer = snapshots.outer_of(arrays)
        self.round = round_number

    def _arrays(self) -> dict[str, np.ndarray]:
        """What is held, by the names of a snapshot."""
        return {**self._public, **snapshots.outer_arrays(self._outer)}

    def _applied(self, change_path: Path) -> dict[str, np.ndarray]:
        with tensorfile.open_checked(change_path, wire.change_schema(self._plan, self._parameters)) as change:
            public = snapshots.public_of(self._public)
            return snapshots.public_arrays(
                functions.apply(public, change.arrays, plan=self._plan, parameters=self._parameters)
            )

    def _merged(self, closing: Closing, update_paths: Sequence[Path]) -> tuple[dict[str, np.ndarray], Outer]:
        """The new public and outer of a mesh; the old ones where nothing that counted could be merged."""
        if len(update_paths) != len(closing.counted):
            raise UpdateError(f"{len(update_paths)} updates for {len(closing.counted)} counted contributions")
        merger = self._merger = self._merger or Merger(self._plan, self._parameters)
        merger.clear()
        for path, counted in zip(update_paths, closing.counted, strict=True):
            with suppress(Unsound):  # here as everywhere
                merger.add(path, counted.weight, counted.factor)
        if not merger.count:
            return self._public, self._outer
        merged = merger.merged(clients=functions.clients_of(closing))
        public = snapshots.public_of(self._public)
        change, outer = functions.advance(
            public, self._outer, merged, closing, plan=self._plan, parameters=self._parameters
        )
        new = functions.apply(public, change, plan=self._plan, parameters=self._parameters)
        return snapshots.public_arrays(new), outer


# ------------------------------------------------------------------------------------------ snapshots as files
def first_public(plan: Plan, parameters: Sequence[Parameter], first_weights: Path) -> Public:
    """`public` before the first round: the first weights, and a control variate of zeros where the plan has one.

    The values are numpy arrays, private to this process. Raises UpdateError.
    """
    return snapshots.public_of(snapshots.load_arrays(first_weights, plan, parameters))


def save_public(public: Public, path: Path) -> str:
    """Write a snapshot without outer state; its fingerprint."""
    arrays = snapshots.public_arrays(public)
    snapshots.save_arrays(arrays, path)
    return snapshots.fingerprint_of(arrays).hex


def load_public(path: Path) -> Public:
    """Any snapshot, as torch tensors, for programs that only read: evaluation, export. Raises StorageError."""
    arrays = tensorfile.open_own(path, private=True).arrays
    public = snapshots.public_of(arrays)
    control = None if public.control is None else as_tensors(as_arrays(public.control))
    return Public(weights=as_tensors(as_arrays(public.weights)), control=control)


def _threads(torch_free: bool) -> int:
    if torch_free:
        return 1
    import torch

    return torch.get_num_threads()


def _expected(
    arrays: dict[str, np.ndarray], plan: Plan, parameters: Sequence[Parameter]
) -> dict[str, np.ndarray]:
    """`arrays` with a control variate of zeros where it lacks one; UpdateError when it is not the plan's public."""
    found = snapshots.complete(arrays, plan, parameters)
    shapes = {name: array.shape for name, array in found.items()}
    expected = {name: shape for name, (_, shape) in wire.snapshot_schema(plan, parameters).items()}
    if shapes != expected:
        name = min(dict(shapes.items() ^ expected.items()))
        raise UpdateError(
            f"public has shape {shapes.get(name)} for '{name}'; the parameter table has {expected.get(name)}"
        )
    return found
