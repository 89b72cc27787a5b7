"""A client's side: star and mesh reach the same bits, restarts lose nothing, torch stays out where it is not used."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from manyhands.errors import StorageError, UpdateError
from manyhands.plan import wire
from manyhands.updates import checks, tensorfile
from manyhands.updates.aggregation import Aggregation
from manyhands.updates.participant import Participant, first_public, load_public, save_public
from manyhands.updates.seeds import seed_generators
from manyhands.updates.snapshots import save_arrays
from manyhands.updates.types import Public

KINDS = {
    "fedavg": {},
    "adamw": {"outer": {"name": "adamw", "lr": 0.1}, "local": {"kind": "gradient"}},
    "scaffold int8": {
        "local": {"control_variate": True},
        "codec": {"name": "int8", "block": 16, "error_feedback": True},
        "outer": {"name": "nesterov", "momentum": 0.5},
    },
}


class Run:
    """A run in a directory: participants, and in a star an aggregation."""

    def __init__(self, make, directory, plan, clients=("one", "two")):
        self.make, self.directory, self.plan = make, directory, plan
        self.parameters = make.parameters(make.Trainer.shapes())
        self.first = directory / "first.safetensors"
        save_public(Public(weights={"w": torch.full((6, 3), 0.1), "b": torch.zeros(3)}), self.first)
        self.trainers = {c: make.Trainer(plan, seed, shift=seed) for seed, c in enumerate(clients)}
        self.participants = {c: self.participant(c) for c in clients}
        self.aggregation = None
        if plan.topology == "star":
            self.aggregation = Aggregation(plan, self.parameters, directory / "aggregator", self.first)
        self.rounds = []  # closing, change, updates

    def participant(self, client):
        public = first_public(self.plan, self.parameters, self.first)
        return Participant(self.plan, self.parameters, self.trainers[client], public)

    def step(self, number, lost=()):
        paths, claims, counted, uncounted = {}, {}, {}, {}
        for ordinal, (client, participant) in enumerate(self.participants.items()):
            assignment = self.make.assignment(number, client, ordinal=ordinal)
            paths[assignment.id] = self.directory / f"update-{assignment.id}.safetensors"
            claims[assignment.id] = participant.work(
                assignment, self.make.terms(self.plan, number), paths[assignment.id]
            )
            (uncounted if client in lost else counted)[assignment.id] = client
        closing = self.make.closing(self.plan, number, counted, uncounted)
        change = self.directory / f"change-{number}.safetensors"
        found = set()
        if self.aggregation is not None:
            for c in closing.counted:
                norm = self.aggregation.merge(
                    c.assignment, paths[c.assignment], round_number=number, weight=c.weight,
                    norm=claims[c.assignment].norm,
                )  # fmt: skip
                assert norm == pytest.approx(claims[c.assignment].norm, rel=1e-6)
            found.add(self.aggregation.advance(closing, change))
        self.rounds.append((closing, change, [paths[c.assignment] for c in closing.counted]))
        held = {self.close(p, number) for p in self.participants.values()}
        assert len(held) == 1, "everybody holds the same"
        found |= {held.public for held in held}
        assert len(found) == 1, "and the same public as the aggregator"
        return held.pop()

    def close(self, participant, number):
        closing, change, updates = self.rounds[number]
        if self.plan.topology == "mesh":
            return participant.close(closing, update_paths=updates)
        return participant.close(closing, change_path=change if closing.counted else None)


@pytest.mark.parametrize("name", KINDS)
def test_star_and_mesh_reach_the_same_bits(make, tmp_path, name):
    found = []
    for topology in ("star", "mesh"):
        directory = tmp_path / topology
        directory.mkdir()
        run = Run(make, directory, make.plan(**KINDS[name], topology=topology))
        found.append([run.step(n, lost=("two",) if n == 2 else ()) for n in range(5)])
    star, mesh = found
    assert [held.public for held in star] == [held.public for held in mesh]
    assert len({held.public for held in star}) == 5
    assert all(held.outer is None for held in star)
    assert len({held.outer for held in mesh}) == (5 if make.plan(**KINDS[name]).outer.name != "sgd" else 1)


def test_a_round_without_counted_updates_changes_nothing_but_the_round(make, tmp_path):
    run = Run(make, tmp_path, make.plan(**KINDS["scaffold int8"]))
    first = run.step(0)
    assert run.step(1, lost=("one", "two")) == first
    assert not (tmp_path / "change-1.safetensors").exists()
    assert run.aggregation.round == run.participants["one"].round == 2
    assert run.step(2) != first


@pytest.mark.parametrize("topology", ["star", "mesh"])
@pytest.mark.parametrize("name", KINDS)
def test_a_newcomer_catches_up_from_a_snapshot(make, tmp_path, name, topology):
    run = Run(make, tmp_path, make.plan(**KINDS[name], topology=topology))
    for number in range(3):
        at = run.step(number)
    snapshot = tmp_path / "snapshot.safetensors"
    assert run.participants["one"].save_public(snapshot) == at
    last = [run.step(number) for number in (3, 4)]
    newcomer = run.participant("two")
    newcomer.load_public(snapshot, 3, at)
    assert [run.close(newcomer, number) for number in (3, 4)] == last
    again = tmp_path / "again.safetensors"
    newcomer.save_public(again)
    run.participants["one"].save_public(snapshot)
    assert again.read_bytes() == snapshot.read_bytes()
    assert run.participants["one"].held() == last[-1]
    assert set(load_public(again).weights) == {"w", "b"}


@pytest.mark.parametrize("spoiled", ["w", "outer/first/w", "outer/second/b", "all outer state"])
def test_a_snapshot_that_does_not_hold_what_it_should_is_refused(make, tmp_path, spoiled):
    run = Run(make, tmp_path, make.plan(**KINDS["adamw"], topology="mesh"))
    run.step(0)
    at = run.step(1)
    snapshot = tmp_path / "snapshot.safetensors"
    assert run.participants["one"].save_public(snapshot) == at
    with tensorfile.open_own(snapshot, private=True) as file:
        arrays = {n: a for n, a in file.arrays.items() if spoiled in file.arrays or "outer/" not in n}
        if spoiled in arrays:
            arrays[spoiled].flat[0] += 1
        save_arrays(arrays, snapshot)
    newcomer = run.participant("two")
    before = newcomer.held()
    of = "public" if spoiled == "w" else "outer state"
    with pytest.raises(
        UpdateError, match=f"the fingerprint of its {of} is .*, expected {at[of != 'public'][:16]}"
    ):
        newcomer.load_public(snapshot, 2, at)
    assert (newcomer.held(), newcomer.round) == (before, 0)


def test_a_mesh_without_outer_state_yet_starts_from_such_a_snapshot(make, tmp_path):
    run = Run(make, tmp_path, make.plan(**KINDS["adamw"], topology="mesh"))
    at = run.step(0, lost=("one", "two"))
    assert at.outer is None
    run.participants["one"].save_public(tmp_path / "snapshot")
    newcomer = run.participant("two")
    newcomer.load_public(tmp_path / "snapshot", 1, at)
    last = run.step(1)
    assert run.close(newcomer, 1) == last
    assert last.outer is not None


@pytest.mark.parametrize("settled", ["close", "settle"])
@pytest.mark.parametrize("lost", [(), ("one",)])
def test_a_restart_between_work_and_closing_loses_nothing(make, tmp_path, lost, settled):
    """The local state saved after the work, settled after the restart, gives the same updates as without one."""
    plan = make.plan(**KINDS["scaffold int8"])
    straight = Run(make, tmp_path, plan)
    straight.step(0)
    one = straight.participants["one"]
    before = tmp_path / "before.safetensors"
    before_held = one.save_public(before)
    saved = {}
    close = straight.close

    def saving(participant, number):
        if participant is one and number == 1:
            one.save_local(tmp_path / "local.safetensors")
            saved["local"] = one.local
        return close(participant, number)

    straight.close = saving
    at = straight.step(1, lost=lost)
    restarted = straight.participant("one")
    restarted.load_local(tmp_path / "local.safetensors")
    assert restarted.local.pending.keys() == {1}
    if settled == "close":
        restarted.load_public(before, 1, before_held)
        assert close(restarted, 1) == at
    else:
        after = tmp_path / "after.safetensors"
        straight.aggregation.snapshot(after)
        restarted.load_public(after, 2, at)
        restarted.settle([straight.rounds[1][0]])
    assert not restarted.local.pending
    assignment, terms = make.assignment(2, "one", ordinal=9), make.terms(plan, 2)
    claims = [
        participant.work(assignment, terms, tmp_path / f"u{i}")
        for i, participant in enumerate((one, restarted))
    ]
    assert (tmp_path / "u0").read_bytes() == (tmp_path / "u1").read_bytes()
    assert claims[0].start == claims[1].start == "1-0"
    assert claims[0].norm == claims[1].norm


def test_claims_say_what_was_done(make, tmp_path):
    run = Run(make, tmp_path, make.plan())
    participant = run.participants["one"]
    claims = participant.work(make.assignment(0, "one"), make.terms(run.plan, 0), tmp_path / "u")
    with tensorfile.open_checked(tmp_path / "u", wire.update_schema(run.plan, run.parameters)) as file:
        exact = np.sqrt(sum((a.astype(np.float64) ** 2).sum() for a in file.arrays.values()))
    assert claims.norm == pytest.approx(exact, rel=1e-6)
    assert participant.check(tmp_path / "u", claims.norm) == claims.norm
    assert (claims.start, claims.samples, claims.device, claims.threads) == (
        "fresh",
        20,
        "cpu",
        torch.get_num_threads(),
    )
    assert claims.loss > 0
    assert claims.work_ms >= 0
    with pytest.raises(UpdateError, match="was claimed"):
        participant.check(tmp_path / "u", claims.norm * 1.01)


def test_work_that_fails_leaves_no_file_and_no_trace(make, tmp_path):
    run = Run(make, tmp_path, make.plan(**KINDS["scaffold int8"]))
    participant = run.participants["one"]
    run.step(0)
    before = participant.local

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    run.trainers["one"].train = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        participant.work(make.assignment(1, "one"), make.terms(run.plan, 1), tmp_path / "u")
    assert participant.local is before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("u") or path.name.endswith(".part")]


def test_a_closing_out_of_order_or_incomplete_changes_nothing(make, tmp_path):
    run = Run(make, tmp_path, make.plan())
    run.step(0)
    participant = run.participants["one"]
    at = participant.held()
    closing, change, _ = run.rounds[0]
    with pytest.raises(UpdateError, match="of round 0; expected 1"):
        participant.close(closing, change_path=change)
    following = make.closing(run.plan, 1, {"1-0": "one"})
    with pytest.raises(UpdateError, match="without a change"):
        participant.close(following)
    change.write_bytes(change.read_bytes()[:-4])
    with pytest.raises(UpdateError, match="bytes long"):
        participant.close(following, change_path=change)
    assert (participant.round, participant.held()) == (1, at)


def spoil(run, path, name="delta/w", value=np.nan):
    with tensorfile.create(path, wire.update_schema(run.plan, run.parameters)) as file:
        file.arrays[name].flat[0] = value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, -np.inf, 2.0**61])
def test_a_mesh_leaves_out_what_nobody_can_merge(make, tmp_path, kind, value):
    """A quorum has agreed on it, so it is too late to object: everybody goes on as if it were not there."""
    runs = []
    for name in ("spoiled", "without"):
        directory = tmp_path / name
        directory.mkdir()
        runs.append(Run(make, directory, make.plan(**KINDS[kind], topology="mesh")))
        runs[-1].step(0)
    spoiled, without = runs
    closing, _, updates = spoiled.rounds[0]
    int8 = spoiled.plan.codec.name == "int8"
    spoil(spoiled, updates[1], *(("delta/w.scale", value) if int8 else ("delta/w", value)))
    following = make.closing(spoiled.plan, 1, {c.assignment: c.client for c in closing.counted})
    held = {p.close(following, update_paths=updates) for p in spoiled.participants.values()}
    alone = replace(following, counted=following.counted[:1], uncounted=following.uncounted)
    if not spoiled.plan.local.control_variate:  # whose divisor is everybody who worked
        held |= {without.participants["one"].close(alone, update_paths=without.rounds[0][2][:1])}
    assert len(held) == 1


def test_a_mesh_that_can_merge_nothing_stays_where_it_is(make, tmp_path):
    run = Run(make, tmp_path, make.plan(**KINDS["adamw"], topology="mesh"))
    at = run.step(0)
    closing, _, updates = run.rounds[0]
    for path in updates:
        spoil(run, path)
    following = make.closing(run.plan, 1, {c.assignment: c.client for c in closing.counted})
    assert run.participants["one"].close(following, update_paths=updates) == at
    assert run.participants["one"].round == 2


def test_no_sum_decides_after_the_closing(make, tmp_path, monkeypatch):
    run = Run(make, tmp_path, make.plan(topology="mesh"))
    run.step(0)
    monkeypatch.setattr(checks, "_squares", lambda _: pytest.fail("a float sum after the closing"))
    closing, _, updates = run.rounds[0]
    following = make.closing(run.plan, 1, {c.assignment: c.client for c in closing.counted})
    one, two = (p.close(following, update_paths=updates) for p in run.participants.values())
    assert one == two


def test_a_mesh_refuses_a_damaged_file_and_stays_as_it_was(make, tmp_path):
    """Everybody has agreed on other bytes than these, so this is no matter of leaving something out."""
    run = Run(make, tmp_path, make.plan(topology="mesh"))
    at = run.step(0)
    closing, _, updates = run.rounds[0]
    following = make.closing(run.plan, 1, {c.assignment: c.client for c in closing.counted})
    participant = run.participants["one"]
    with pytest.raises(UpdateError, match="1 updates for 2"):
        participant.close(following, update_paths=updates[:1])
    updates[1].write_bytes(updates[1].read_bytes()[:-4])
    with pytest.raises(UpdateError, match="bytes long"):
        participant.close(following, update_paths=updates)
    assert (participant.round, participant.held()) == (1, at)


def test_public_must_be_the_plans(make, tmp_path):
    run = Run(make, tmp_path, make.plan())
    for weights in (
        {"w": torch.zeros(6, 3)},
        {"w": torch.zeros(3, 6), "b": torch.zeros(3)},
        {"w": torch.zeros(6, 3), "b": torch.zeros(3), "x": torch.zeros(1)},
    ):
        with pytest.raises(UpdateError, match="parameter table"):
            Participant(run.plan, run.parameters, None, Public(weights=weights))
    other = tmp_path / "other.safetensors"
    save_public(Public(weights={"w": torch.zeros(6, 4), "b": torch.zeros(3)}), other)
    at = run.participants["one"].held()
    with pytest.raises(UpdateError, match=r"shape \[6, 4\]; expected \[6, 3\]"):
        run.participants["one"].load_public(other, 0, at)
    assert run.participants["one"].held() == at


def test_local_state_of_another_run_is_refused(make, tmp_path):
    run = Run(make, tmp_path, make.plan(**KINDS["scaffold int8"]))
    run.step(0)
    run.participants["one"].save_local(tmp_path / "local")
    wider = make.parameters({"w": (6, 4), "b": (3,)})
    other = Participant(run.plan, wider, None, Public(weights={"w": torch.zeros(6, 4), "b": torch.zeros(3)}))
    with pytest.raises(StorageError, match="not a client's local state"):
        other.load_local(tmp_path / "local")
    assert other.local.after == "fresh"


def test_one_who_only_watches_does_not_work(make, tmp_path):
    run = Run(make, tmp_path, make.plan())
    observer = Participant(run.plan, run.parameters, None, load_public(run.first))
    with pytest.raises(UpdateError, match="without a trainer"):
        observer.work(make.assignment(0, "one"), make.terms(run.plan, 0), tmp_path / "u")


def test_the_same_seed_gives_the_same_random_numbers():
    drawn = []
    for _ in range(2):
        seed_generators(2**62 + 5)
        drawn.append((torch.rand(3).tolist(), np.random.rand(3).tolist()))
    assert drawn[0] == drawn[1]


TORCH_FREE = """
import sys
from pathlib import Path
import numpy as np
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.updates.aggregation import Aggregation
from manyhands.updates.participant import Participant, first_public, save_public
from manyhands.updates.types import Public
place = Path(sys.argv[1])
plan = Plan.parse({"task": {"name": "dummy"}, "outer": {"name": "nesterov", "momentum": 0.9}})
parameters = (Parameter(name="w", shape=(5,)),)
save_public(Public(weights={"w": np.ones(5, np.float32)}), place / "first")
participant = Participant(plan, parameters, None, first_public(plan, parameters, place / "first"), torch_free=True)
Aggregation(plan, parameters, place / "aggregator", place / "first")
participant.save_local(place / "local")
participant.load_local(place / "local")
assert participant.public.weights["w"].tolist() == [1] * 5
assert "torch" not in sys.modules, "torch was loaded"
"""


def test_without_a_model_there_is_no_torch(tmp_path):
    subprocess.run([sys.executable, "-c", TORCH_FREE, str(tmp_path)], check=True, timeout=60)
