"""The JSON of views: what is not finite, what is missing, what is newer."""

from __future__ import annotations

import json
import math

import pytest

from manyhands.errors import ProtocolError
from manyhands.node.view import RunView

RUN = {
    "run_id": "r-1",
    "name": "r",
    "phase": "training",
    "closed_rounds": 2,
    "total_rounds": 5,
    "topology": "star",
    "started_ms": 0,
    "now_ms": 10,
    "clients": [{"key": "a" * 64, "status": "ready"}, {"key": "b" * 64, "status": "lost"}],
    "rounds": [
        {
            "round": n,
            "closed_ms": n,
            "duration_ms": 1,
            "mean_loss": 3.0 - n,
            "counted": [{"client": "a" * 64}],
        }
        for n in range(2)
    ],
    "incidents": [
        {"ms": 1, "client": "b" * 64, "what": "lost"},
        {"ms": 2, "client": "b" * 64, "what": "rejoined"},
    ],
}


def test_round_trip_through_json() -> None:
    view = RunView.parse(RUN)
    assert RunView.parse(json.loads(view.model_dump_json())) == view


def test_a_loss_that_is_not_finite_is_none() -> None:
    """A diverged run must still be shown: JSON has no NaN."""
    broken = {**RUN, "evaluations": [{"round": 0, "loss": math.nan}, {"round": 5, "loss": math.inf}]}
    view = RunView.parse(broken)
    assert [e.loss for e in view.evaluations] == [None, None]
    json.dumps(view.model_dump(mode="json"), allow_nan=False)


def test_fields_of_a_newer_server_are_ignored() -> None:
    assert RunView.parse({**RUN, "from_the_future": 1}) == RunView.parse(RUN)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ProtocolError, match="closed_rounds"):
        RunView.parse({key: value for key, value in RUN.items() if key != "closed_rounds"})


def test_summary() -> None:
    summary = RunView.parse(RUN).summary()
    assert (summary.live_clients, summary.mean_loss, summary.closed_rounds) == (1, 2.0, 2)


def test_since_leaves_out_what_is_known() -> None:
    newer = RunView.parse(RUN).since(1, 1)
    assert [r.round for r in newer.rounds] == [1]
    assert [i.what for i in newer.incidents] == ["rejoined"]
    assert newer.clients == RunView.parse(RUN).clients
