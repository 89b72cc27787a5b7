"""Runs in one process: every preset learns, topologies agree, and the same plan gives the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manyhands.coordination.events import Contributed, WorkFailed
from manyhands.coordination.machine import initial_state, tick
from manyhands.engine.run import train
from manyhands.errors import ManyhandsError, PlanError
from manyhands.plan.presets import PRESETS
from manyhands.plan.schema import Plan
from manyhands.simulation import RoundResult, Simulated, simulate
from manyhands.simulation.stage import Stage
from manyhands.simulation.world import World, client_keys
from manyhands.updates.exact import fingerprint

MakePlan = Callable[..., Plan]


def weights_of(simulated: Simulated) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in simulated.weights.items()}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_learns(make_plan: MakePlan, preset: str) -> None:
    plan = make_plan(preset)

    simulated = simulate(plan, 2 if preset == "fedsgd" else 3)

    assert simulated.state.phase == "finished"
    assert simulated.first_loss == pytest.approx(np.log(256), rel=0.05)  # bytes, and it knows nothing yet
    assert simulated.last_loss < 0.75 * simulated.first_loss
    losses = [result.loss for result in simulated.rounds]
    assert None not in losses
    assert losses[-1] < 0.8 * losses[0]
    assert [result.round for result in simulated.rounds] == list(range(plan.rounds.total))


def test_what_is_reported_is_what_there_is(make_plan: MakePlan) -> None:
    heard: list[RoundResult] = []

    simulated = simulate(make_plan("fedavg", {"rounds": {"total": 3}}), 2, on_round=heard.append)

    assert tuple(heard) == simulated.rounds
    assert all(result.counted == 2 for result in heard)
    assert simulated.fingerprints[-1] == fingerprint(weights_of(simulated)).hex
    assert len(set(simulated.fingerprints)) == 3
    size = sum(4 * w.size for w in weights_of(simulated).values())
    assert all(2 * size < result.update_bytes < 2 * size + 16384 for result in heard)
    assert set(simulated.evaluations) == {0, 2, 3}  # the first one, each snapshot, the last one
    assert simulated.state.evaluations == simulated.evaluations


def test_everybody_does_all_the_steps(make_plan: MakePlan) -> None:
    """They take turns on one machine; whoever's turn is last is not slower for it."""
    simulated = simulate(make_plan("diloco", {"rounds": {"total": 3}}), 3)

    sent = [r.event.contribution for r in simulated.records if isinstance(r.event, Contributed)]
    assert len(sent) == 9
    assert {c.claims.samples for c in sent if c.claims is not None} == {10 * 8}


@pytest.mark.parametrize("topology", ["star", "mesh"])
def test_the_same_plan_gives_the_same_bits(make_plan: MakePlan, topology: str) -> None:
    plan = make_plan("diloco", {"topology": topology, "rounds": {"total": 2}})

    first, again = simulate(plan, 3), simulate(plan, 3)

    assert None not in first.fingerprints
    assert first.fingerprints == again.fingerprints
    assert first.evaluations == again.evaluations
    assert first.records == again.records
    other = simulate(plan.model_copy(update={"seed": plan.seed + 1}), 3)
    assert set(other.fingerprints).isdisjoint(first.fingerprints)


def test_star_and_mesh_give_the_same_weights(make_plan: MakePlan) -> None:
    star = simulate(make_plan("diloco", {"topology": "star", "rounds": {"total": 3}}), 3)
    mesh = simulate(make_plan("diloco", {"topology": "mesh", "rounds": {"total": 3}}), 3)

    # In both the seed of a round's work is that of the event which opened it; that its number differs between
    # the topologies changes nothing, since this model has no dropout and its data come in the plan's order.
    assert star.fingerprints == mesh.fingerprints
    for name, tensor in star.weights.items():
        assert torch.equal(tensor, mesh.weights[name])
    assert star.evaluations == mesh.evaluations


def test_the_log_gives_the_same_state_again(make_plan: MakePlan) -> None:
    simulated = simulate(make_plan("fedavg", {"rounds": {"total": 2}}), 2)

    state = initial_state("run", simulated.state.plan, simulated.state.data.total, _first_snapshot(simulated))
    for record in simulated.records:
        state = tick(state, [record.event], record.now_ms, record.seed).state

    assert state == simulated.state


def _first_snapshot(simulated: Simulated) -> Any:
    """As far as it is still known: the state forgets old ones, so a run of two rounds is looked at."""
    return next(s for s in simulated.state.snapshots if s.round == 0)


def test_int8_with_error_feedback_learns_as_well(make_plan: MakePlan) -> None:
    codec = {"name": "int8", "error_feedback": True}
    dense = simulate(make_plan("diloco"), 2)
    small = simulate(make_plan("diloco", {"codec": codec}), 2)

    assert small.last_loss < 0.75 * small.first_loss
    assert small.last_loss == pytest.approx(dense.last_loss, rel=0.03)
    assert small.rounds[0].update_bytes < 0.3 * dense.rounds[0].update_bytes
    assert set(small.fingerprints).isdisjoint(dense.fingerprints)


def test_an_encoded_change_learns_too(make_plan: MakePlan) -> None:
    codec = {"name": "int8", "error_feedback": True}

    simulated = simulate(make_plan("diloco", {"codec": codec, "change_codec": codec}), 2)

    assert simulated.last_loss < 0.75 * simulated.first_loss


def test_one_client_of_fedsgd_is_training_on_one_machine(make_plan: MakePlan, tmp_path: Path) -> None:
    """ddp is a run of one client: the same data in the same order, and AdamW in exact arithmetic is AdamW."""
    adam = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.0}
    steps = 12
    federated = make_plan(
        "fedsgd",
        {
            "local": {"steps": 1, "optimizer": {"clip_norm": 1.0}},
            "outer": {"lr": 2e-3, **adam},
            "rounds": {"total": steps, "snapshot_every": steps},
        },
    )
    alone = make_plan(
        "diloco",
        {
            "local": {"steps": steps, "optimizer": {"lr": 2e-3, "clip_norm": 0.0, **adam}},
            "rounds": {"total": 1, "snapshot_every": 1},
        },
    )

    simulated = simulate(federated, 1)
    trained = train(alone, tmp_path)

    assert simulated.first_loss == trained.validation_loss_before
    assert simulated.last_loss == pytest.approx(trained.validation_loss_after, rel=1e-4)
    assert simulated.last_loss < 0.9 * simulated.first_loss


@pytest.mark.parametrize(("clients", "low", "high"), [(1, 2, 8), (0, 1, 8), (9, 1, 8)])
def test_a_number_of_clients_that_does_not_fit_the_plan_is_refused(
    make_plan: MakePlan, clients: int, low: int, high: int
) -> None:
    plan = make_plan("diloco", {"membership": {"min_clients": low, "max_clients": high}})

    with pytest.raises(PlanError, match=rf"{clients} clients .* takes {low} to {high}"):
        simulate(plan, clients)


def test_an_allow_list_lends_its_keys(make_plan: MakePlan) -> None:
    allow = [digit * 64 for digit in "abc"]
    plan = make_plan("fedavg", {"membership": {"kind": "allow_list", "allow": allow}, "rounds": {"total": 1}})

    simulated = simulate(plan, 2)

    assert set(simulated.state.clients) == set(allow[:2])
    with pytest.raises(PlanError, match=r"4 clients, but membership\.allow has 3 keys"):
        simulate(plan, 4)


def test_a_run_that_diverges_stands_still_and_says_why(make_plan: MakePlan) -> None:
    plan = make_plan("fedavg", {"local": {"optimizer": {"lr": 1e9}}, "rounds": {"max_failed": 2}})

    with pytest.raises(
        ManyhandsError, match=r"stands still after 2 rounds; it is paused: 2 rounds .* loss is"
    ):
        simulate(plan, 2)


def test_a_dummy_has_nothing_to_simulate() -> None:
    plan = Plan.model_validate({"task": {"name": "dummy"}})

    with pytest.raises(PlanError, match="nothing to simulate"):
        simulate(plan, 2)


def test_a_plan_that_contradicts_itself_is_refused(make_plan: MakePlan) -> None:
    plan = make_plan("diloco").model_copy(update={"topology": "mesh"})
    codec = plan.change_codec.model_copy(update={"name": "int8"})

    with pytest.raises(PlanError, match="change_codec"):
        simulate(plan.model_copy(update={"change_codec": codec}), 2)


@pytest.mark.parametrize(
    ("arguments", "message"), [({}, "needs a plan"), ({"data_dir": Path()}, "needs a plan")]
)
def test_nothing_to_simulate(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        simulate(**arguments)


@pytest.mark.parametrize("topology", ["star", "mesh"])
def test_files_do_not_pile_up(make_plan: MakePlan, tmp_path: Path, topology: str) -> None:
    plan = make_plan(
        "fedavg",
        {"topology": topology, "rounds": {"total": 9, "snapshot_every": 3, "keep_updates": 1}},
        {"local": {"steps": 1}},
    )
    stage = Stage.prepare(plan, tmp_path / "materials")
    counts: list[int] = []
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    world = World(
        stage,
        client_keys(plan, 2),
        scratch,
        lambda _: counts.append(len(list((scratch / "payloads").glob("update-*")))),
    )

    simulated = world.run()

    assert len(counts) == 9
    # A mesh's newcomer would start from the older of two snapshots: it needs the updates since then.
    assert max(counts) <= (2 if topology == "star" else 2 * 2 * 3 + 2)
    assert all(a != b for a, b in itertools.pairwise(simulated.fingerprints))
    assert (tmp_path / "materials" / "first-snapshot.safetensors").exists()  # lent, not deleted


def test_work_that_fails_is_given_back(make_plan: MakePlan, tmp_path: Path) -> None:
    """One client of two diverges: its failure is an event, and the rounds close without it."""
    plan = make_plan("fedavg", {"rounds": {"total": 2}})
    stage = Stage.prepare(plan, tmp_path / "materials")
    keys = client_keys(plan, 2)
    unlucky = keys[0]
    trainer = stage.trainer
    honest = trainer.train

    def train_or_diverge(weights: Any, inner: Any, assignment: Any, terms: Any, **more: Any) -> Any:
        trained = honest(weights, inner, assignment, terms, **more)
        if assignment.client == unlucky:
            name = next(iter(trained.tensors))
            trained.tensors[name][0] = float("nan")
        return trained

    trainer.train = train_or_diverge  # type: ignore[method-assign]
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    simulated = World(stage, keys, scratch).run()

    failures = [r.event for r in simulated.records if isinstance(r.event, WorkFailed)]
    assert {failure.client for failure in failures} == {unlucky}
    assert "nan" in failures[0].reason
    assert [result.counted for result in simulated.rounds] == [1, 1]
