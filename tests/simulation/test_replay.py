"""A recorded run, done again from its log, its materials and its first snapshot alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from manyhands.coordination.events import Contributed
from manyhands.coordination.ledger import RecordedWork, recorded_rounds
from manyhands.coordination.machine import initial_state
from manyhands.coordination.types import BlobRef, Snapshot
from manyhands.errors import PlanError, StorageError, UpdateError
from manyhands.identity.keys import ephemeral
from manyhands.network.blobs.manifest import manifest_of
from manyhands.network.blobs.store import BlobStore
from manyhands.plan.descriptor import Material, RunDescriptor
from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan
from manyhands.plan.signing import sign_descriptor
from manyhands.simulation import RecordedRun, ReplayedRound, simulate
from manyhands.simulation.replay import RecordGap
from manyhands.simulation.stage import Stage
from manyhands.simulation.world import Simulated, World, client_keys
from manyhands.storage.database import open_database
from manyhands.storage.events import RunLog
from manyhands.storage.runs import create_run

MakePlan = Callable[..., Plan]
RUN = "recorded-1"


def descriptor_of(stage: Stage, first: BlobRef, materials: dict[str, Material], key: str) -> RunDescriptor:
    return RunDescriptor(
        run_id=RUN,
        plan=stage.plan,
        plan_hash=plan_hash(stage.plan),
        samples=stage.samples,
        parameters=stage.parameters,
        materials=materials,
        first_snapshot=Material(blob=first.blob, size_bytes=first.size_bytes),
        first_fingerprint=stage.first_fingerprint,
        server_key=key,
    )


def record(plan: Plan, data: Path, scratch: Path, *, micro_batch: int | None = None) -> Simulated:
    """What a server leaves of a run: the log in its database, and the materials and first weights among its blobs."""
    scratch.mkdir()
    stage = Stage.prepare(plan, scratch / "materials")
    stage.trainer.micro_batch_size = micro_batch
    simulated = World(stage, client_keys(plan, 2), scratch).run()
    data.mkdir()
    blobs, identity = BlobStore(data / "blobs"), ephemeral()
    first = blobs.put_file(stage.first_snapshot)
    materials = {}
    for name in ("train.tokens", "validation.tokens", "tokenizer.json", "split.json", "model.json"):
        ref = blobs.put_file(scratch / "materials" / name)
        materials[name] = Material(blob=ref.blob, size_bytes=ref.size_bytes)
    descriptor = descriptor_of(stage, first, materials, identity.public)
    database = open_database(data / "manyhands.db")
    try:
        text = descriptor.model_dump_json().encode()
        create_run(database, RUN, text, sign_descriptor(identity, descriptor))
        log = RunLog(database, RUN)
        log.append(log.acquire("here"), 0, simulated.records, [])
    finally:
        database.close()
    return simulated


@pytest.fixture(scope="module", params=["star", "mesh", "scaffold", "int8"])
def recorded(
    request: pytest.FixtureRequest, make_plan: MakePlan, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Simulated]:
    torch.set_num_threads(1)
    short = {"rounds": {"total": 3}, "local": {"steps": 4}}
    plan = {
        "star": lambda: make_plan("diloco", short),
        "mesh": lambda: make_plan("diloco", short, {"topology": "mesh"}),
        "scaffold": lambda: make_plan("scaffold", short),
        "int8": lambda: make_plan("diloco", short, {"codec": {"name": "int8", "error_feedback": True}}),
    }[request.param]()
    place = tmp_path_factory.mktemp(str(request.param))
    return place / "data", record(plan, place / "data", place / "scratch")


def test_a_recorded_run_gives_the_same_bits_again(recorded: tuple[Path, Simulated]) -> None:
    data, simulated = recorded
    heard: list[ReplayedRound] = []

    replayed = simulate(ledger=RUN, data_dir=data, on_round=heard.append)

    assert tuple(heard) == replayed.rounds
    assert tuple(r.replayed for r in replayed.rounds) == simulated.fingerprints
    assert replayed.equal
    assert replayed.first_difference is None


def test_the_plan_may_be_given_when_it_is_the_recorded_one(
    recorded: tuple[Path, Simulated], make_plan: MakePlan
) -> None:
    data, _ = recorded
    run = RecordedRun.open(RUN, data)

    assert simulate(run.descriptor.plan, ledger=run).equal
    with pytest.raises(PlanError, match="was recorded with"):
        simulate(make_plan("fedavg"), ledger=run)


def _altered(run: RecordedRun, number: int, change: Callable[[RecordedWork], RecordedWork]) -> RecordedRun:
    """With the first work of a round changed."""
    rounds = list(run.rounds)
    works = rounds[number].works
    rounds[number] = replace(rounds[number], works=(change(works[0]), *works[1:]))
    return replace(run, rounds=tuple(rounds))


@pytest.fixture(scope="module")
def star(make_plan: MakePlan, tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("altered")
    record(make_plan("diloco", {"rounds": {"total": 2}, "local": {"steps": 3}}), place / "d", place / "s")
    return RecordedRun.open(RUN, place / "d")


def test_work_in_micro_batches_is_replayed_in_the_same_ones(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan("diloco", {"rounds": {"total": 2}, "local": {"steps": 3}})
    record(plan, tmp_path / "d", tmp_path / "s", micro_batch=3)
    run = RecordedRun.open(RUN, tmp_path / "d")
    works = [work for recorded in run.rounds for work in recorded.works]
    assert {work.claims.micro_batch for work in works if work.claims is not None} == {3}

    assert simulate(ledger=run).equal

    def all_at_once(work: RecordedWork) -> RecordedWork:
        assert work.claims is not None
        return replace(work, claims=replace(work.claims, micro_batch=0))

    assert not simulate(ledger=_altered(run, 0, all_at_once)).equal, "then it would not matter"


def test_another_range_of_data_is_noticed(star: RecordedRun) -> None:
    """If any replay came out equal, the comparison would show nothing."""

    def other_data(work: RecordedWork) -> RecordedWork:
        assert work.claims is not None
        ranges = work.assignment.ranges
        moved = tuple(replace(r, start=r.start + 1000, stop=r.stop + 1000) for r in ranges)
        claims = replace(work.claims, norm=norm_of_other_data[0]) if norm_of_other_data else work.claims
        return replace(work, assignment=replace(work.assignment, ranges=moved), claims=claims)

    norm_of_other_data: list[float] = []
    with pytest.raises(
        UpdateError, match=r"the norm is [\d.]+ but"
    ) as refused:  # the claim is of the recorded data
        simulate(ledger=_altered(star, 1, other_data))
    found = re.search(r"the norm is ([\d.]+) but", str(refused.value))
    assert found is not None
    norm_of_other_data.append(float(found.group(1)))

    replayed = simulate(ledger=_altered(star, 1, other_data))

    assert [round_.equal for round_ in replayed.rounds] == [True, False]
    assert not replayed.equal
    assert replayed.first_difference == replayed.rounds[1]


def test_a_wrong_fingerprint_is_named(star: RecordedRun) -> None:
    rounds = (replace(star.rounds[0], fingerprint="0" * 64), star.rounds[1])

    replayed = simulate(ledger=replace(star, rounds=rounds))

    assert not replayed.equal
    assert replayed.first_difference is not None
    assert replayed.first_difference.round == 0
    assert replayed.rounds[1].equal


def test_a_start_that_nobody_made_is_a_gap(star: RecordedRun) -> None:
    def from_nowhere(work: RecordedWork) -> RecordedWork:
        assert work.claims is not None
        return replace(work, claims=replace(work.claims, start="7-99"))

    with pytest.raises(RecordGap, match="started from local state '7-99'"):
        simulate(ledger=_altered(star, 1, from_nowhere))


def test_a_counted_update_of_which_nothing_is_recorded_is_a_gap(star: RecordedRun) -> None:
    with pytest.raises(RecordGap, match="of which nothing is recorded"):
        simulate(ledger=_altered(star, 1, lambda work: replace(work, claims=None)))


def test_what_an_uncounted_client_has_made_up_stops_nothing(star: RecordedRun) -> None:
    """A refused contribution may claim any start: it is left out, and the rest comes out equal."""
    first = star.rounds[0]
    honest = first.works[0]
    assert honest.claims is not None
    made_up = replace(
        honest,
        assignment=replace(honest.assignment, id="0-99", client="f" * 64),
        claims=replace(honest.claims, start="5-55"),
        counted=False,
    )
    rounds = (replace(first, works=(*first.works, made_up)), *star.rounds[1:])

    assert simulate(ledger=replace(star, rounds=rounds)).equal


def test_work_that_was_lost_and_gone_on_from_is_done_again(make_plan: MakePlan, tmp_path: Path) -> None:
    """A client whose update never arrived goes on from the local state behind it: the replay makes that state."""
    plan = make_plan("diloco", {"rounds": {"total": 2}, "local": {"steps": 3}})
    stage = Stage.prepare(plan, tmp_path / "materials")
    keys = client_keys(plan, 2)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    world = World(stage, keys, scratch)
    take, lost = world._take, []

    def lossy(event: object) -> None:
        if isinstance(event, Contributed) and event.contribution.round == 0 and not lost:
            lost.append(event.contribution.assignment)
            return
        take(event)  # type: ignore[arg-type]

    world._take = lossy  # type: ignore[method-assign]
    simulated = world.run()
    assert [result.counted for result in simulated.rounds] == [1, 2]
    starts = {
        r.event.contribution.claims.start
        for r in simulated.records
        if isinstance(r.event, Contributed) and r.event.contribution.claims is not None
    }
    assert lost[0] in starts

    assert simulate(ledger=_recorded_from(stage, simulated, tmp_path / "materials")).equal


def _recorded_from(stage: Stage, simulated: Simulated, materials: Path) -> RecordedRun:
    ref = manifest_of(stage.first_snapshot).ref
    first = Snapshot(round=0, blob=ref, fingerprint=stage.first_fingerprint)
    state = initial_state(RUN, stage.plan, stage.samples, first)
    return RecordedRun(
        descriptor=descriptor_of(stage, ref, {}, "0" * 64),
        rounds=recorded_rounds(state, simulated.records),
        materials={path.name: path for path in materials.iterdir()},
        first_snapshot=stage.first_snapshot,
    )


def test_a_directory_without_a_server_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no server's database"):
        simulate(ledger=RUN, data_dir=tmp_path)


def test_arguments_that_would_be_ignored_are_refused(
    star: RecordedRun, make_plan: MakePlan, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="beside a ledger"):
        simulate(None, 3, ledger=star)  # type: ignore[call-overload]
    with pytest.raises(PlanError, match="opened record"):
        simulate(ledger=star, data_dir=tmp_path)
    with pytest.raises(PlanError, match="without a ledger"):
        simulate(make_plan("fedavg"), data_dir=tmp_path)  # type: ignore[call-overload]


def test_threads_are_put_back(star: RecordedRun) -> None:
    torch.set_num_threads(2)

    simulate(ledger=star)

    assert torch.get_num_threads() == 2
