from __future__ import annotations

import struct
from pathlib import Path

from manyhands.node.view import RunView
from manyhands.ui.plot import LossPoints, loss_curve, points_of, with_gaps

KEY = "a1" * 32


def test_points_of_a_run() -> None:
    view = RunView.parse(
        {
            "run_id": "r",
            "name": "r",
            "phase": "finished",
            "closed_rounds": 2,
            "total_rounds": 2,
            "topology": "star",
            "started_ms": 0,
            "now_ms": 0,
            "clients": [{"key": KEY, "label": "one", "status": "left"}],
            "rounds": [
                {
                    "round": 0,
                    "closed_ms": 0,
                    "duration_ms": 0,
                    "mean_loss": 4.0,
                    "counted": [{"client": KEY, "loss": 4.0}],
                },
                {"round": 1, "closed_ms": 0, "duration_ms": 0, "counted": []},
            ],
            "incidents": [{"ms": 0, "client": KEY, "what": "lost", "round": 1}],
            "evaluations": [{"round": 0, "loss": 5.0}, {"round": 2, "loss": None}],
        }
    )
    points = points_of(view)
    assert points.training == [(0, 4.0)]
    assert points.validation == [(0, 5.0)]
    assert points.clients == {"one a1a1a1a1": [(0, 4.0)]}
    assert points.lost == [(1, "one lost")]


def test_a_picture_of_the_promised_size(tmp_path: Path) -> None:
    points = LossPoints(
        title="$x^2$ _hidden",
        unit="nats per token",
        training=[(0, 6.0), (1, 4.0), (2, 3.5)],
        validation=[(0, 6.5), (3, 3.4)],
        clients={"_a $b": [(0, 6.1), (2, 3.4)]},
        lost=[(1, "hand-2 lost")],
    )
    path = tmp_path / "deep" / "loss.png"
    loss_curve(points, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", data[16:24]) == (1600, 900)


def test_a_run_without_rounds_has_a_picture_too(tmp_path: Path) -> None:
    empty = LossPoints(title="r", unit="", training=[], validation=[], clients={})
    loss_curve(empty, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_no_line_over_rounds_that_a_client_missed() -> None:
    curve = with_gaps([(0, 5.0), (1, 4.0), (4, 3.0)])
    assert [x for x, _ in curve] == [0, 1, 3, 4]
    assert [y == y for _, y in curve] == [True, True, False, True]
