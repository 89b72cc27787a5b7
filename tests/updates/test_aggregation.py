"""The aggregator's durable side: a kill at any point, repeated calls, and what it refuses."""

from __future__ import annotations

import os

import numpy as np
import pytest

from manyhands.errors import StorageError, UpdateError
from manyhands.plan import wire
from manyhands.updates import aggregation as module
from manyhands.updates import tensorfile
from manyhands.updates.aggregation import Aggregation
from manyhands.updates.codecs import encode
from manyhands.updates.snapshots import save_arrays

PLAN = {
    "outer": {"name": "adamw", "lr": 0.1},
    "local": {"control_variate": True},
    "codec": {"name": "int8", "block": 16},
    "change_codec": {"name": "int8", "block": 16, "error_feedback": True},
}


class Killed(BaseException):
    """Stands for the process's end."""


@pytest.fixture
def scene(make, tmp_path):
    plan, parameters = make.plan(**PLAN), make.parameters({"w": (20, 7), "b": (7,)})
    first = tmp_path / "first.safetensors"
    save_arrays({"w": np.ones((20, 7), np.float32), "b": np.zeros(7, np.float32)}, first)
    updates = {}
    for number in range(4):
        for ordinal in range(2):
            source = np.random.default_rng(number * 10 + ordinal)
            path = tmp_path / f"update-{number}-{ordinal}"
            with tensorfile.written(path, wire.update_schema(plan, parameters)) as out:
                for channel in wire.channels(plan):
                    for p in parameters:
                        values = source.normal(size=p.shape).astype(np.float32)
                        for suffix, array in encode(values, plan.codec).items():
                            np.copyto(out[f"{channel}/{p.name}{suffix}"], array)
            updates[f"{number}-{ordinal}"] = path
    return plan, parameters, first, updates


def closing_of(make, plan, number):
    return make.closing(
        plan, number, {f"{number}-0": "one", f"{number}-1": "two"}, weights={f"{number}-0": 3}
    )


def merge_all(found, closing, updates):
    for c in closing.counted:
        found.merge(
            c.assignment, updates[c.assignment], round_number=closing.round, weight=c.weight, norm=None
        )


def play(make, scene, directory, rounds=4):
    """Fingerprints and changes of a run without interruptions."""
    plan, parameters, first, updates = scene
    found = Aggregation(plan, parameters, directory, first)
    results = []
    for number in range(rounds):
        closing = closing_of(make, plan, number)
        merge_all(found, closing, updates)
        change = directory / "out"
        results.append((found.advance(closing, change), change.read_bytes()))
    return results


PLACES = [
    (module, "advance_arrays", 0),
    (tensorfile, "flush_all", 0),
    (tensorfile, "publish", 0),
    (module, "_hand_out", 0),
    (os, "fsync", 0),
    (os, "fsync", 1),
    (os, "fsync", 2),
    (os, "fsync", 3),
    (os, "fsync", 4),
    (os, "fsync", 5),
    (os, "replace", 0),
    (os, "replace", 1),
    (os, "replace", 2),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name", "nth"), PLACES, ids=lambda v: str(getattr(v, "__name__", v)))
def test_a_kill_at_any_point_of_advance_loses_nothing(
    make, scene, tmp_path, monkeypatch, owner, name, nth, after
):
    plan, parameters, first, updates = scene
    expected = play(make, scene, tmp_path / "straight", rounds=3)
    directory = tmp_path / "killed"
    found = Aggregation(plan, parameters, directory, first)
    change = tmp_path / "change"
    results = []
    for number in range(3):
        closing = closing_of(make, plan, number)
        merge_all(found, closing, updates)
        if number == 1:
            real, calls = getattr(owner, name), []

            def dying(*arguments, _real=real, _calls=calls, **named):
                _calls.append(1)
                if len(_calls) != nth + 1:
                    return _real(*arguments, **named)
                if after:
                    _real(*arguments, **named)
                raise Killed

            with monkeypatch.context() as patched:
                patched.setattr(owner, name, dying)
                with pytest.raises(Killed):
                    found.advance(closing, change)
            for part in (".change-1.safetensors.part", ".state.json.part"):  # as SIGKILL would leave them
                (directory / part).write_bytes(b"half")
            found = Aggregation(plan, parameters, directory, tmp_path / "not needed any more")
            if found.round == number:
                merge_all(found, closing, updates)
        results.append((found.advance(closing, change), change.read_bytes()))
    assert results == expected


def test_repeated_calls_do_nothing_twice(make, scene, tmp_path):
    plan, parameters, first, updates = scene
    expected = play(make, scene, tmp_path / "straight", rounds=2)
    found = Aggregation(plan, parameters, tmp_path / "a", first)
    for number in range(2):
        closing = closing_of(make, plan, number)
        merge_all(found, closing, updates)
        merge_all(found, closing, updates)
        assert found.merged == (f"{number}-0", f"{number}-1")
        for _ in range(2):
            change = tmp_path / "change"
            assert (found.advance(closing, change), change.read_bytes()) == expected[number]
            change.unlink()
    assert found.round == 2


def test_a_restart_before_the_first_round_begins_again(make, scene, tmp_path, monkeypatch):
    plan, parameters, first, _ = scene
    with monkeypatch.context() as patched:
        patched.setattr(Aggregation, "_commit", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            Aggregation(plan, parameters, tmp_path / "a", first)
    assert play(make, scene, tmp_path / "a", 1) == play(make, scene, tmp_path / "b", 1)


def test_what_was_merged_must_be_what_counts(make, scene, tmp_path):
    plan, parameters, first, updates = scene
    found = Aggregation(plan, parameters, tmp_path / "a", first)
    closing = closing_of(make, plan, 0)
    found.merge("0-1", updates["0-1"], round_number=0, weight=1, norm=None)
    with pytest.raises(UpdateError, match=r"counts \['0-0', '0-1'\] but the sum holds \['0-1'\]"):
        found.advance(closing, tmp_path / "change")
    with pytest.raises(UpdateError, match="restart_round"):
        found.merge("0-1", updates["0-1"], round_number=0, weight=2, norm=None)
    found.merge("0-0", updates["0-0"], round_number=0, weight=3, norm=None)
    with pytest.raises(UpdateError, match="in its order"):
        found.advance(closing, tmp_path / "change")
    assert not (tmp_path / "change").exists()
    found.restart_round()
    merge_all(found, closing, updates)
    expected = play(make, scene, tmp_path / "straight", rounds=1)
    assert found.advance(closing, tmp_path / "change") == expected[0][0]


def test_rounds_that_are_not_due_are_refused(make, scene, tmp_path):
    plan, parameters, first, updates = scene
    found = Aggregation(plan, parameters, tmp_path / "a", first)
    with pytest.raises(UpdateError, match="merging round 0"):
        found.merge("1-0", updates["1-0"], round_number=1, weight=1, norm=None)
    with pytest.raises(UpdateError, match="of round 1; the aggregator is at round 0"):
        found.advance(closing_of(make, plan, 1), tmp_path / "change")
    closing = closing_of(make, plan, 0)
    merge_all(found, closing, updates)
    found.advance(closing, tmp_path / "change")
    with pytest.raises(UpdateError, match="a closing does not change"):
        found.advance(make.closing(plan, 0, {"0-0": "one"}), tmp_path / "change")


def test_rounds_that_counted_nothing_are_moved_over(make, scene, tmp_path):
    plan, parameters, first, updates = scene
    found = Aggregation(plan, parameters, tmp_path / "a", first)
    merge_all(found, closing_of(make, plan, 0), updates)
    at = found.fingerprint
    found.move_on(2, at)
    assert (found.round, found.merged, found.fingerprint) == (2, (), at)
    found = Aggregation(plan, parameters, tmp_path / "a", first)
    assert found.round == 2
    closing = closing_of(make, plan, 2)
    merge_all(found, closing, updates)
    fingerprint = found.advance(closing, tmp_path / "change")
    for behind, known in ((0, at), (2, at), (3, fingerprint)):
        found.move_on(behind, known)
    assert found.advance(closing, tmp_path / "change") == fingerprint
    other = Aggregation(plan, parameters, tmp_path / "b", first)
    for number in (0, 1):
        assert other.advance(make.closing(plan, number, {}), tmp_path / "none") == at
    merge_all(other, closing, updates)
    assert other.advance(closing, tmp_path / "change") == fingerprint


def test_a_refused_update_leaves_the_sum(make, scene, tmp_path):
    plan, parameters, first, updates = scene
    found = Aggregation(plan, parameters, tmp_path / "a", first)
    closing = closing_of(make, plan, 0)
    updates["0-9"] = tmp_path / "bad"
    updates["0-9"].write_bytes(updates["1-0"].read_bytes()[:-1])
    with pytest.raises(UpdateError):
        found.merge("0-9", updates["0-9"], round_number=0, weight=1, norm=None)
    with pytest.raises(UpdateError, match="was claimed"):
        found.merge("0-8", updates["1-0"], round_number=0, weight=1, norm=1e-3)
    merge_all(found, closing, updates)
    expected = play(make, scene, tmp_path / "straight", rounds=1)
    assert found.advance(closing, tmp_path / "change") == expected[0][0]


def test_a_snapshot_is_a_file_of_its_own(make, scene, tmp_path):
    plan, parameters, first, updates = scene
    found = Aggregation(plan, parameters, tmp_path / "a", first)
    assert found.snapshot(tmp_path / "s") == found.fingerprint
    held = (tmp_path / "s").read_bytes()
    for number in range(2):
        closing = closing_of(make, plan, number)
        merge_all(found, closing, updates)
        found.advance(closing, tmp_path / "change")
    assert (tmp_path / "s").read_bytes() == held
    again = Aggregation(plan, parameters, tmp_path / "b", tmp_path / "s")
    assert again.fingerprint == Aggregation(plan, parameters, tmp_path / "c", first).fingerprint


def test_a_change_that_was_handed_out_is_not_written_again(make, scene, tmp_path):
    """It is another link to the aggregator's file: a later round must not write into it."""
    plan, parameters, first, updates = scene
    found = Aggregation(plan, parameters, tmp_path / "a", first)
    held = []
    for number in range(4):
        closing = closing_of(make, plan, number)
        merge_all(found, closing, updates)
        found.advance(closing, tmp_path / f"change-{number}")
        held.append((tmp_path / f"change-{number}").read_bytes())
    assert [(tmp_path / f"change-{n}").read_bytes() for n in range(4)] == held
    assert len(set(held)) == 4
    assert len(list((tmp_path / "a").glob("change-*"))) == 1


def test_the_change_may_be_asked_for_under_the_aggregators_own_name(make, scene, tmp_path):
    plan, parameters, first, updates = scene
    expected = play(make, scene, tmp_path / "straight", rounds=2)
    found = Aggregation(plan, parameters, tmp_path / "a", first)
    for number in range(2):
        closing = closing_of(make, plan, number)
        merge_all(found, closing, updates)
        change = tmp_path / "a" / f"change-{number}.safetensors"
        for _ in range(2):
            assert (found.advance(closing, change), change.read_bytes()) == expected[number]
    assert not list((tmp_path / "a").glob("*.part"))


def test_another_file_system_gets_a_copy(make, scene, tmp_path, monkeypatch):
    plan, parameters, first, updates = scene
    expected = play(make, scene, tmp_path / "straight", rounds=1)

    def across(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", across)
    found = Aggregation(plan, parameters, tmp_path / "a", first)
    closing = closing_of(make, plan, 0)
    merge_all(found, closing, updates)
    assert found.advance(closing, tmp_path / "change") == expected[0][0]
    assert (tmp_path / "change").read_bytes() == expected[0][1]


@pytest.mark.parametrize("text", ["", "[]", '{"round": 1}', '{"round": 1, "counted": 3}'])
def test_a_broken_state_file_is_an_error_and_not_a_new_run(scene, tmp_path, text):
    plan, parameters, first, _ = scene
    Aggregation(plan, parameters, tmp_path / "a", first).close()
    (tmp_path / "a" / module.STATE).write_text(text)
    with pytest.raises(StorageError, match=r"state\.json"):
        Aggregation(plan, parameters, tmp_path / "a", first)


# ------------------------------------------------------------------------- what the coordinator knows
RUN = {"run_id": "run", "plan_hash": "a" * 64}


def standing_at(make, scene, directory, rounds):
    """An aggregator's directory after so many closings; the fingerprint after each of them."""
    plan, parameters, first, updates = scene
    found = Aggregation(plan, parameters, directory, first, **RUN)
    at = [found.fingerprint]
    for number in range(rounds):
        closing = closing_of(make, plan, number)
        merge_all(found, closing, updates)
        at.append(found.advance(closing, directory / "out"))
    found.close()
    return at


def test_a_directory_that_is_where_the_run_is_goes_on(make, scene, tmp_path):
    plan, parameters, first, _ = scene
    at = standing_at(make, scene, tmp_path / "a", 2)
    found = Aggregation(plan, parameters, tmp_path / "a", first, **RUN)
    found.stand_at(2, at[2])
    assert found.round == 2
    found.stand_at(4, at[2])  # two rounds that counted nothing
    assert found.round == 4


def test_an_empty_directory_is_refused_in_the_middle_of_a_run(make, scene, tmp_path):
    plan, parameters, first, updates = scene
    at = standing_at(make, scene, tmp_path / "a", 2)
    found = Aggregation(plan, parameters, tmp_path / "lost", first, **RUN)
    told = rf"at round 2 with the fingerprint {at[2][:16]}.*at round 0 with {at[0][:16]}.*Restore.*new run"
    with pytest.raises(StorageError, match=told):
        found.stand_at(2, at[2])
    with pytest.raises(StorageError, match=told):
        found.move_on(2, at[2])
    assert found.round == 0
    with pytest.raises(UpdateError):
        found.merge("2-0", updates["2-0"], round_number=2, weight=1, norm=None)


def test_a_directory_that_is_ahead_is_only_right_for_the_closing_that_it_applied(make, scene, tmp_path):
    plan, parameters, first, _ = scene
    at = standing_at(make, scene, tmp_path / "a", 2)
    found = Aggregation(plan, parameters, tmp_path / "a", first, **RUN)
    closing = closing_of(make, plan, 1)
    found.stand_at(1, at[1], closing=closing)
    assert found.advance(closing, tmp_path / "change") == at[2]
    for known in (None, make.closing(plan, 1, {"1-0": "one"}), closing_of(make, plan, 0)):
        with pytest.raises(StorageError, match="at round 1 with"):
            found.stand_at(1, at[1], closing=known)
    with pytest.raises(StorageError, match="at round 0 with"):
        found.stand_at(0, at[0], closing=closing_of(make, plan, 0))


def test_a_snapshot_stands_in_for_a_lost_directory_if_nothing_else_was_in_it(make, scene, tmp_path):
    """Plain SGD outside keeps no state; then public is all there is."""
    _, parameters, first, updates = scene
    plan = make.plan(
        codec={"name": "int8", "block": 16}, local={"control_variate": True}, outer={"name": "sgd"}
    )
    plain = (plan, parameters, first, updates)
    at = standing_at(make, plain, tmp_path / "a", 2)
    before = Aggregation(plan, parameters, tmp_path / "a", first, **RUN)
    before.snapshot(tmp_path / "snapshot")
    found = Aggregation(plan, parameters, tmp_path / "lost", first, **RUN)
    with pytest.raises(StorageError, match="Restore"):
        found.stand_at(2, at[2], snapshot=first)  # one that is not of this round
    found.stand_at(2, at[2], snapshot=tmp_path / "snapshot")
    assert (found.round, found.fingerprint) == (2, at[2])
    found = Aggregation(plan, parameters, tmp_path / "lost", first, **RUN)
    closing = closing_of(make, plan, 2)
    for one in (before, found):
        one.stand_at(2, at[2])
        merge_all(one, closing, updates)
    assert found.advance(closing, tmp_path / "1") == before.advance(closing, tmp_path / "2")


def test_a_snapshot_does_not_stand_in_for_the_state_of_an_outer_optimizer(make, scene, tmp_path):
    plan, parameters, first, _ = scene
    at = standing_at(make, scene, tmp_path / "a", 2)
    Aggregation(plan, parameters, tmp_path / "a", first, **RUN).snapshot(tmp_path / "snapshot")
    found = Aggregation(plan, parameters, tmp_path / "lost", first, **RUN)
    with pytest.raises(StorageError, match="Restore"):
        found.stand_at(2, at[2], snapshot=tmp_path / "snapshot")


@pytest.mark.parametrize("other", [{"run_id": "other"}, {"plan_hash": "b" * 64}], ids=["run", "plan"])
def test_the_directory_of_another_run_is_refused(make, scene, tmp_path, other):
    plan, parameters, first, _ = scene
    standing_at(make, scene, tmp_path / "a", 1)
    with pytest.raises(StorageError, match=r"holds run 'run' of plan aaaa.*restore"):
        Aggregation(plan, parameters, tmp_path / "a", first, **(RUN | other))


def test_a_file_of_public_that_was_exchanged_is_refused(make, scene, tmp_path):
    plan, parameters, first, _ = scene
    at = standing_at(make, scene, tmp_path / "a", 2)
    slot = {p.name: p for p in (tmp_path / "a").glob("public-*")}
    swapped = [p.read_bytes() for p in slot.values()]
    for path, content in zip(slot.values(), reversed(swapped), strict=True):
        path.write_bytes(content)
    found = Aggregation(plan, parameters, tmp_path / "a", first, **RUN)
    with pytest.raises(StorageError, match="damaged"):
        found.stand_at(2, at[2])
