"""A client with several devices: its processes do the work of one, and live and die together."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from manyhands import load_plan, simulate
from manyhands.errors import PlanError, WorkerError
from manyhands.node import worker_group
from manyhands.node.worker_group import WorkerGroup
from manyhands.simulation.replay import RecordGap

THREE_ROUNDS = {"membership.min_clients": 1, "rounds.total": 3, "rounds.snapshot_every": 1}


def ranks_of(client: Any) -> dict[int, Any]:
    """The living processes of its worker, by rank."""
    found = {}
    for child in client.look_at_children():
        title = child.cmdline()[-1]
        if title.startswith("rank="):
            found[int(title.removeprefix("rank="))] = child
    return found


def claims_of(house: Any) -> list[dict[str, Any]]:
    works = [work for row in house.ledger() for work in row["works"]]
    return [work["contribution"]["claims"] for work in works if work["contribution"]]


def weights_at_the_end(place: Path) -> dict[str, torch.Tensor]:
    """What the client held after the last round."""
    (file,) = place.glob("runs/run/*/public-3.safetensors")
    return {name.removeprefix("weights/"): tensor for name, tensor in load_file(file).items()}


# ------------------------------------------------------------------------------------------- the group itself
Check = Callable[[WorkerGroup], Awaitable[None]]
DUMMY = "manyhands.node.workers.dummy_worker"  # no torch: it starts at once


def with_group(place: Path, check: Check, silence_s: float | None = 30) -> None:
    """Let `check` have a group of two whose ranks both listen; nothing of it may be left afterwards."""

    async def run() -> None:
        group = await WorkerGroup.start(
            DUMMY, 2, directory=place, log=place / "worker.log", silence_s=silence_s
        )
        try:
            with pytest.raises(WorkerError, match="nonsense"):
                await group.call_all("nonsense")
            assert group.alive, "an operation that fails alike everywhere is no death"
            async with asyncio.timeout(60):
                await check(group)
        finally:
            await group.stop()
        assert not any(psutil.pid_exists(process.pid) for process in group._processes)

    asyncio.run(run())


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_death_ends_all_and_is_the_one_that_is_told(tmp_path: Path, rank: int) -> None:
    async def check(group: WorkerGroup) -> None:
        os.kill(group._processes[rank].pid, signal.SIGKILL)
        await asyncio.gather(*(process.ended() for process in group._processes))
        with pytest.raises(
            WorkerError, match=rf"^rank {rank} of 2: the worker process \d+ was killed by signal 9"
        ):
            await group.call("nonsense")

    with_group(tmp_path, check)


def test_a_rank_that_stands_still_ends_all(tmp_path: Path) -> None:
    async def check(group: WorkerGroup) -> None:
        os.kill(group._processes[1].pid, signal.SIGSTOP)
        await asyncio.gather(*(process.ended() for process in group._processes))
        assert "since it had not answered for 1 s" in group.last_words()

    with_group(tmp_path, check, silence_s=1)


def test_ranks_that_are_out_of_step_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has failed, and the other would wait for it."""
    monkeypatch.setattr(worker_group, "OUT_OF_STEP_S", 0.3)

    async def check(group: WorkerGroup) -> None:
        os.kill(group._processes[1].pid, signal.SIGSTOP)
        while psutil.Process(group._processes[1].pid).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.01)
        with pytest.raises(WorkerError, match=r"^rank 0 of 2 failed alone: .*nonsense"):
            await group.call_all("nonsense")
        assert not group.alive

    with_group(tmp_path, check, silence_s=None)


def test_what_ranks_do_together_is_done_also_when_nobody_waits_any_more(tmp_path: Path) -> None:
    async def check(group: WorkerGroup) -> None:
        asked = asyncio.create_task(group.call_all("nonsense"))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        with pytest.raises(WorkerError, match="nonsense"):
            await group.call_all("nonsense")
        assert group.alive

    with_group(tmp_path, check)


# ------------------------------------------------------------------------------------------- in a run
GRADIENT = {"preset": "fedsgd", "local.kind": "gradient", "local.steps": 2, "local.batch_size": 5}
LLAMA = {
    "task.model_type": "llama",
    "task.model": {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}


@pytest.mark.slow
def test_in_a_mesh_beside_a_client_with_one_device(house: Any, tiny_gpt: dict[str, Any]) -> None:
    house.plan(tiny_gpt, {**THREE_ROUNDS, "topology": "mesh", "membership.min_clients": 2})
    house.server()
    both = [house.client("ann", "--data-parallelism", "2"), house.client("ben")]
    for client in both:
        assert client.ended() == 0, client.text()
    house.until_phase("finished")
    assert [house.counted(client) for client in both] == [[0, 1, 2]] * 2


def test_a_task_without_a_model_has_nothing_to_share(house: Any, dummy_plan: dict[str, Any]) -> None:
    house.plan(dummy_plan, {"membership.min_clients": 1})
    house.server()
    client = house.client("ann", "--data-parallelism", "2")
    assert client.ended() == PlanError.exit_code, client.text()
    assert "'dummy', which has no model that 2 processes could share" in client.text()


SHAPES = [
    pytest.param({}, ("--data-parallelism", "2", "--optim-stats-steps", "2"), (2, 1), id="ddp"),
    pytest.param(GRADIENT, ("--data-parallelism", "2", "--micro-batch-size", "1"), (2, 1), id="gradient"),
    pytest.param(LLAMA, ("--tensor-parallelism", "2"), (1, 2), id="tensor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("changes", "options", "shape"), SHAPES)
def test_several_processes_do_what_one_does(
    house: Any,
    tiny_gpt: dict[str, Any],
    changes: dict[str, Any],
    options: tuple[str, ...],
    shape: tuple[int, int],
) -> None:
    house.plan(tiny_gpt, {**THREE_ROUNDS, **changes})
    house.server()
    client = house.client("ann", *options)
    assert client.ended() == 0, client.text()
    house.until_phase("finished")
    assert house.counted(client) == [0, 1, 2]
    claims = claims_of(house)
    assert {(c["data_parallelism"], c["tensor_parallelism"]) for c in claims} == {shape}

    steps = [event["step"] for event in client.said("optimizer_stats")]
    assert steps == (list(range(2, 3 * 4 + 1, 2)) if "--optim-stats-steps" in options else [])

    alone = simulate(load_plan(house.plan_file), clients=1)
    assert [c["loss"] for c in claims] == pytest.approx([r.loss for r in alone.rounds], rel=1e-5)
    together = weights_at_the_end(house.place / "ann-home")
    assert together.keys() == alone.weights.keys()
    for name, tensor in alone.weights.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_rank_that_is_killed_ends_the_group_and_the_run_goes_on(
    house: Any, tiny_gpt: dict[str, Any], until: Callable[..., Any]
) -> None:
    house.plan(tiny_gpt, {**THREE_ROUNDS, "local.steps": 40})
    house.server()
    client = house.client("ann", "--data-parallelism", "2")
    until(lambda: client.said("progress") and client.said("work", round=1), "work")
    before = ranks_of(client)
    assert sorted(before) == [0, 1]
    os.kill(before[1].pid, signal.SIGKILL)
    assert client.ended() == 0, client.text()
    house.until_phase("finished")
    (death,) = client.said("worker_died")
    assert f"rank 1 of 2: the worker process {before[1].pid} was killed by signal 9" in death["text"]
    assert not any(process.is_running() for process in before.values())
    assert house.counted(client) == [0, 1, 2], "no round was lost"
    assert "rejoined" not in house.incidents(client)
    with pytest.raises(RecordGap, match=r"several processes together \(data_parallelism 2"):
        simulate(ledger="run", data_dir=house.server_home / "server")
