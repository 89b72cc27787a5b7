"""The ledger as text, from rounds in the JSON form of coordination/ledger.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import TypeAdapter

from manyhands.coordination.ledger import RoundAccount, WorkAccount
from manyhands.coordination.types import (
    Assignment,
    BlobRef,
    Claims,
    Closing,
    Contribution,
    OuterTerms,
    RoundTerms,
)
from manyhands.ui.ledger_view import ledger_rows, print_ledger

ONE, TWO = "a1" * 32, "b2" * 32


def work(
    client: str, *, counted: bool, reason: str = "", position: int | None = None, factor: float = 1.0
) -> WorkAccount:
    assignment = Assignment(
        id=f"3-{client[:2]}", round=3, client=client, steps=30, batch_size=12, ranges=(), weight=360, seed=1
    )
    contribution = Contribution(
        assignment=assignment.id,
        round=3,
        client=client,
        commit="c",
        update=BlobRef(blob="d" * 64, size_bytes=2048),
        claims=Claims(norm=1.0, loss=2.5),
    )
    return WorkAccount(
        assignment=assignment,
        counted=counted,
        reason=reason,
        contribution=contribution if counted else None,
        assigned_ms=1000,
        opened_ms=4500 if counted else None,
        position=position,
        factor=factor if counted else None,
        witnesses=(),
        objections=(),
    )


def rounds(*works: WorkAccount) -> list[dict[str, Any]]:
    terms = RoundTerms(
        round=3, fragment=0, first_step=0, learning_rates=(0.1,), outer=OuterTerms(lr=1.0), deadline_ms=9
    )
    closing = Closing(round=3, fragment=0, counted=(), uncounted=(), outer=OuterTerms(lr=1.0), closed_ms=0)
    account = RoundAccount(
        number=3,
        opened_ms=0,
        terms=terms,
        closing=closing,
        published_ms=0,
        change=None,
        fingerprint=None,
        works=works,
    )
    dumped: list[dict[str, Any]] = TypeAdapter(tuple[RoundAccount, ...]).dump_python((account,), mode="json")
    return dumped


def test_rows_in_the_order_of_merging() -> None:
    told = rounds(
        work(TWO, counted=False, reason="lost: no heartbeat"),
        work(ONE, counted=True, position=1, factor=0.25),
        work("c3" * 32, counted=True, position=0),
    )
    rows = ledger_rows(told, {ONE: "one"})
    assert [row["client"] for row in rows] == ["c3c3c3c3", "one a1a1a1a1", "b2b2b2b2"]
    assert [row["outcome"] for row in rows] == [
        "merged",
        "merged, clipped by 0.25",
        "not merged: lost: no heartbeat",
    ]
    assert rows[1] == {
        "round": 3,
        "client": "one a1a1a1a1",
        "assigned": "30 x 12",
        "outcome": "merged, clipped by 0.25",
        "weight": 360,
        "loss": "2.5000",
        "sent": "2.0 KiB",
        "took": "3.5 s",
    }
    assert (rows[2]["sent"], rows[2]["took"], rows[2]["loss"]) == ("-", "-", "-")


def test_a_round_without_work_is_said() -> None:
    assert ledger_rows(rounds(), {}) == [{"round": 3, "client": "-", "outcome": "nobody had work"}]


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    told = rounds(work(ONE, counted=True, position=0))
    incident = {"ms": 0, "round": 1, "client": ONE, "what": "lost", "detail": "given back: 1-0"}
    print_ledger(told, [incident], {}, "json")
    assert json.loads(capsys.readouterr().out) == {"rounds": told, "incidents": [incident]}


def test_as_text_with_incidents(capsys: pytest.CaptureFixture[str]) -> None:
    print_ledger(
        [],
        [{"ms": 0, "round": 1, "client": ONE, "what": "lost", "detail": "given back: 1-0"}],
        {ONE: "one"},
        "table",
    )
    text = capsys.readouterr().out
    assert "What happened" in text
    assert "one a1a1a1a1" in text
    assert "given back: 1-0" in text
