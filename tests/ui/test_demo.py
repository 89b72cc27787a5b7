"""The parts of the demo that need no processes; its whole course is run by the integration tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manyhands.node.view import RunView
from manyhands.ui.demo import DemoOptions, demo_plan, rejoined_round

KEY, OTHER = "a1" * 32, "b2" * 32


@pytest.mark.parametrize(("clients", "needed"), [(1, 1), (2, 1), (3, 2), (8, 7)])
def test_one_client_may_be_away(clients: int, needed: int) -> None:
    assert demo_plan(DemoOptions(clients=clients)).membership.min_clients == needed


@pytest.mark.parametrize("rounds", [3, 4, 16, 200])
@pytest.mark.parametrize("topology", ["star", "mesh"])
def test_every_length_and_topology_is_a_valid_plan(rounds: int, topology: Any) -> None:
    plan = demo_plan(DemoOptions(rounds=rounds, topology=topology))
    assert (plan.rounds.total, plan.topology) == (rounds, topology)
    assert plan.schedule.warmup_steps < rounds * plan.local.steps


def test_the_warm_up_fits_where_rounds_are_short() -> None:
    assert demo_plan(DemoOptions()).schedule.warmup_steps == 30
    assert demo_plan(DemoOptions(rounds=4, overrides=("local.steps=3",))).schedule.warmup_steps == 1
    assert demo_plan(DemoOptions(overrides=("schedule.warmup_steps=7",))).schedule.warmup_steps == 7


def test_ones_own_text_and_overrides_win(tmp_path: Path) -> None:
    text = tmp_path / "my, text=1.txt"
    plan = demo_plan(DemoOptions(text=text, overrides=("local.steps=7", "task.text.max_bytes=1000")))
    assert plan.task.name == "language_model"
    assert plan.task.text.path == str(text)
    assert plan.task.text.max_bytes == 1000
    assert plan.local.steps == 7


def view(rounds: dict[int, list[str]], incidents: list[tuple[int, str]]) -> RunView:
    """Round n closes at 10 * (n + 1) ms."""
    return RunView.parse(
        {
            "run_id": "r",
            "name": "r",
            "phase": "training",
            "closed_rounds": len(rounds),
            "total_rounds": 9,
            "topology": "star",
            "started_ms": 0,
            "now_ms": 0,
            "rounds": [
                {
                    "round": n,
                    "closed_ms": 10 * (n + 1),
                    "duration_ms": 10,
                    "counted": [{"client": key} for key in keys],
                }
                for n, keys in rounds.items()
            ],
            "incidents": [{"ms": ms, "client": KEY, "what": what} for ms, what in incidents],
        }
    )


def test_rejoined_round() -> None:
    both, one = [KEY, OTHER], [OTHER]
    gone = [(25, "lost"), (35, "rejoined")]
    assert rejoined_round(view({0: both, 1: both, 2: one}, gone[:1]), KEY, 1) is None  # not back yet
    assert (
        rejoined_round(view({0: both, 1: both, 2: one, 3: one}, gone), KEY, 1) is None
    )  # back, not merged yet
    assert rejoined_round(view({0: both, 1: both, 2: one, 3: one, 4: both}, gone), KEY, 1) == 4
    # What it had sent before it was killed counts in the round of the kill: that is no coming back.
    assert rejoined_round(view({0: both, 1: both, 2: both}, [(21, "lost"), (22, "rejoined")]), KEY, 2) is None
