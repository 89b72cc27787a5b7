"""Runs in one process: the same plan, the same `tick`, the same five functions, and no network.

    simulate(plan, clients=4)                           a run, from its first round to its last
    simulate(ledger="demo-1a2b3c")                      a networked run again, from what its server has recorded

Both do the work that clients do, one after the other, on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

from manyhands.errors import PlanError
from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan
from manyhands.simulation.recorded import RecordedRun
from manyhands.simulation.replay import Replayed, ReplayedRound, replay
from manyhands.simulation.world import RoundResult, Simulated, run

__all__ = ["RecordedRun", "Replayed", "ReplayedRound", "RoundResult", "Simulated", "simulate"]

DEFAULT_CLIENTS = 3


@overload
def simulate(
    plan: Plan,
    clients: int = DEFAULT_CLIENTS,
    *,
    device: str = "cpu",
    allowed_tasks: Sequence[str] = (),
    on_round: Callable[[RoundResult], None] | None = None,
) -> Simulated: ...
@overload
def simulate(
    plan: Plan | None = None,
    *,
    ledger: RecordedRun | str,
    data_dir: Path | None = None,
    device: str = "cpu",
    allowed_tasks: Sequence[str] = (),
    on_round: Callable[[ReplayedRound], None] | None = None,
) -> Replayed: ...
def simulate(
    plan: Plan | None = None,
    clients: int | None = None,
    *,
    ledger: RecordedRun | str | None = None,
    data_dir: Path | None = None,
    device: str = "cpu",
    allowed_tasks: Sequence[str] = (),
    on_round: Callable[[Any], None] | None = None,
) -> Simulated | Replayed:
    """Carry out `plan` with so many clients (3), or do the work of a recorded run again.

    The same plan gives the same result each time, on one kind of machine with one number of torch threads.
    `on_round` hears of every round once its fingerprint is agreed.

    `ledger`: a RecordedRun, or a run id of the server whose data are in `data_dir` (default:
    MANYHANDS_HOME/server). The plan may then be left out; one that is given must be the recorded one.
    `allowed_tasks`: code that the plan may name, as for a client.

    Raises PlanError (also for more or fewer clients than `plan.membership` lets in), DataError, and
    ManyhandsError when the run cannot finish or the record has gaps.
    """
    if ledger is None:
        if plan is None:
            raise PlanError("simulate needs a plan, or the ledger of a run that was recorded")
        if data_dir is not None:
            raise PlanError(
                f"data_dir is {str(data_dir)!r} without a ledger: it says where a run is recorded"
            )
        number = DEFAULT_CLIENTS if clients is None else clients
        return run(plan, number, device=device, allowed_tasks=allowed_tasks, on_round=on_round)
    if clients is not None:
        raise PlanError(
            f"clients is {clients} beside a ledger, which says who took part: leave one of them out"
        )
    if isinstance(ledger, str):
        ledger = RecordedRun.open(ledger, data_dir)
    elif data_dir is not None:
        raise PlanError(f"data_dir is {str(data_dir)!r}, but the ledger is an opened record: give its run id")
    recorded = ledger.descriptor
    if plan is not None and plan_hash(plan) != recorded.plan_hash:
        raise PlanError(
            f"the plan has the hash {plan_hash(plan)[:16]}..., but run '{recorded.run_id}' was recorded with "
            f"{recorded.plan_hash[:16]}...: leave the plan out, or give that one"
        )
    return replay(ledger, device=device, allowed_tasks=allowed_tasks, on_round=on_round)
