"""What a server tells the person who started it: rounds as they close, clients that come and go, how it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from manyhands.node.server.served_run import ServedRun
from manyhands.node.server.views import RunViews
from manyhands.node.view import RoundView, RunView

Event = dict[str, Any]


async def narrate(run: ServedRun, views: RunViews, tell: Callable[[Event], None]) -> None:
    """Tell events with a `text` each, until the server stops; of what was before this start, only where it stands."""
    before: RunView | None = None
    with contextlib.suppress(BrokenPipeError):  # nobody reads any more: the run goes on
        async for view in views.changes(run):
            if view is not None:
                for event in _news(before, view):
                    tell(event)
                before = view


def _news(before: RunView | None, view: RunView) -> Iterator[Event]:
    over = view.phase in ("finished", "failed")
    if not over:
        yield from _phase(before, view)
    if before is not None:
        for incident in view.incidents:
            who = _name(incident.client, view)
            yield {"kind": "incident", "client": incident.client, "text": f"{who} {incident.text}"}
        for closed in view.rounds:
            yield {"kind": "round", "round": closed.round, "text": _closed(closed, view)}
        for evaluation in view.evaluations[len(before.evaluations) :]:
            if evaluation.loss is not None:  # a dummy has no model to judge
                text = f"validation loss {evaluation.loss:.4f} after {evaluation.round} rounds"
                yield {"kind": "evaluation", "round": evaluation.round, "text": text}
    if over:
        yield from _phase(before, view)
    if view.checkpoint and (before is None or view.checkpoint != before.checkpoint):
        yield {"kind": "checkpoint", "checkpoint": view.checkpoint, "text": f"checkpoint {view.checkpoint}"}


def _phase(before: RunView | None, view: RunView) -> Iterator[Event]:
    if before is None or (view.phase, view.reason) != (before.phase, before.reason):
        reason = f": {view.reason}" if view.reason else ""
        yield {"kind": "phase", "phase": view.phase, "text": f"{view.phase.replace('_', ' ')}{reason}"}


def _closed(closed: RoundView, view: RunView) -> str:
    loss = "" if closed.mean_loss is None else f", training loss {closed.mean_loss:.4f}"
    left_out = "".join(f"; {_name(u.client, view)} not: {u.reason}" for u in closed.uncounted)
    number = f"round {closed.round} ({closed.round + 1} of {view.total_rounds})"
    return f"{number}: {len(closed.counted)} merged{loss}{left_out}"


def _name(key: str, view: RunView) -> str:
    """As in the ledger: clients of one machine often have the same label."""
    label = next((client.label for client in view.clients if client.key == key), "")
    return f"{label} {key[:8]}" if label else key[:8]
