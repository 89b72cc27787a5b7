"""A star of a server and dummy clients, all of them the installed command in processes of their own."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from manyhands.plan.compose import load_plan


def test_two_clients_finish_and_the_ledger_says_who_did_what(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    house.plan(dummy_plan, {"rounds.total": 4})
    server = house.server()
    clients = [house.client("ann"), house.client("ben")]
    for client in clients:
        assert client.ended() == 0, client.text()
        assert client.events()[-1]["kind"] == "finished"
        assert {event["round"] for event in client.said("progress")} <= {0, 1, 2, 3}
    view = house.until_phase("finished")
    sent = {c["key"]: c["bytes_up"] for c in view["clients"]}
    assert sent == {c.key: c.said("sent")[-1]["bytes_up"] for c in clients}, (
        "nobody looked while they were here"
    )
    assert min(sent.values()) > 4 * 4 * 250_000
    assert view["closed_rounds"] == 4
    until(lambda: "finished: all 4 rounds are done" in server.text(), "the server to say how it ended", 10)
    told = server.text()
    assert "round 3 (4 of 4): 2 merged" in told
    assert re.search(r"ann [0-9a-f]{8} joined", told)
    assert "validation loss" not in told, "a dummy has no model to judge"
    assert {c["key"]: c["counted"] for c in view["clients"]} == {c.key: 4 for c in clients}

    rounds = house.ledger()
    assert [row["number"] for row in rounds] == [0, 1, 2, 3]
    for row in rounds:
        assert {work["assignment"]["client"] for work in row["works"]} == {c.key for c in clients}
        assert all(work["counted"] and work["duration_ms"] >= 0 for work in _durations(row))
        assert len(row["closing"]["counted"]) == 2
        assert row["fingerprint"]
    assert len({row["fingerprint"] for row in rounds}) == 4
    taken = [tuple(r.values()) for row in rounds for w in row["works"] for r in w["assignment"]["ranges"]]
    assert len(set(taken)) == len(taken), "two pieces of work were given the same samples"

    until(lambda: _updates_there(house, rounds) == [3], "old updates to be deleted (keep_updates=1)", 20)
    printed = house.command("ledger", "run", "--format", "json")
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout)
    kept = house.server_home / "runs" / "run" / "plan.yaml"
    assert load_plan(kept) == load_plan(house.plan_file), "what eval finds the plan of a run by"
    server.send(signal.SIGTERM)
    assert server.ended(10) == 0


def _durations(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**work, "duration_ms": work["opened_ms"] - work["assigned_ms"]} for work in row["works"]]


def _updates_there(house: Any, rounds: list[dict[str, Any]]) -> list[int]:
    """Rounds whose counted updates are all in the blob store, and none of whose is gone."""
    store = house.server_home / "server" / "blobs" / "objects"
    there = []
    for row in rounds:
        names = [c["update"]["blob"] for c in row["closing"]["counted"]]
        found = [(store / name[:2] / name).exists() for name in names]
        assert all(found) or not any(found) or row["number"] < 3, f"round {row['number']} is half gone"
        if any(found):
            there.append(row["number"])
    return there


def test_a_client_that_joins_in_the_middle_works_from_the_next_round(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    house.plan(dummy_plan, {"rounds.total": 200, "task.delay_s": 1.0})
    house.server()
    house.client("ann"), house.client("ben")
    house.until_closed(1)
    late = house.client("cleo")
    joined = until(lambda: house.member(late).get("status") == "ready" and house.closed(), "cleo to be ready")
    first, second = until(lambda: len(house.counted(late)) > 1 and house.counted(late), "contributions")[:2]
    assert 1 <= first <= joined + 1
    assert second == first + 1
    assert late.said("catching_up")


def test_sigint_lets_a_client_say_good_bye(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    house.plan(
        dummy_plan,
        {"rounds.total": 200, "task.delay_s": 3.0, "rounds.lost_after_s": 300, "membership.min_clients": 1},
    )
    house.server()
    staying, going = house.client("ann"), house.client("ben")
    until(lambda: going.said("work"), "work to begin")
    started = time.monotonic()
    going.send(signal.SIGINT)
    assert going.ended() == 130
    assert time.monotonic() - started < 5
    assert "start the same command again" in going.text()
    view = until(lambda: house.member(going).get("status") == "left" and house.view(), "the good-bye")
    assert "left" in house.incidents(going)
    given_back = until(
        lambda: [
            work
            for row in house.ledger()
            for work in row["works"]
            if work["assignment"]["client"] == going.key and not work["counted"]
        ],
        "the round to close without it",
    )
    assert "its client left" in given_back[0]["reason"]
    assert view["phase"] == "training"
    assert staying.process.poll() is None


def test_a_second_sigint_leaves_at_once(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    house.plan(dummy_plan, {"rounds.total": 200, "task.delay_s": 0.2})
    server = house.server()
    client = house.client("ann")
    until(lambda: house.member(client), "the client to join")
    server.send(signal.SIGSTOP)  # so that the good-bye is not heard, and the client waits for its answer
    client.send(signal.SIGINT)
    until(lambda: "once more to leave at once" in client.text(), "the first signal to be heard")
    client.send(signal.SIGINT)
    started = time.monotonic()
    assert client.ended() == 130
    assert time.monotonic() - started < 1
    server.send(signal.SIGCONT)


def test_the_server_ends_and_starts_again_while_clients_wait(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    house.plan(dummy_plan, {"rounds.total": 12, "task.delay_s": 0.5})
    server = house.server()
    clients = [house.client("ann"), house.client("ben")]
    house.until_closed(2)
    started = time.monotonic()
    server.send(signal.SIGTERM)
    assert server.ended(10) == 0, server.text()
    assert time.monotonic() - started < 5
    for client in clients:
        until(lambda client=client: client.said("disconnected"), "the client to say that it waits")
    time.sleep(1.0)
    house.server()
    before = house.closed()
    assert before >= 2
    for client in clients:
        assert client.ended() == 0, client.text()
    view = house.until_phase("finished")
    assert [row["round"] for row in view["rounds"]] == list(range(12))
    for client in clients:
        # The same boot throughout: nobody had to join anew, and no restart of the server cost a contribution.
        assert "rejoined" not in house.incidents(client)
        assert house.counted(client) == list(range(12))


def test_a_server_that_is_watched_ends_without_complaint(house: Any, dummy_plan: dict[str, Any]) -> None:
    """A page that follows the run holds a connection open; the end does not wait for it."""
    house.plan(dummy_plan)
    server = house.server()
    with urllib.request.urlopen(f"http://{house.address}/api/runs/run/changes", timeout=10) as changes:
        assert changes.readline().startswith(b"data: ")
        server.send(signal.SIGTERM)
        assert server.ended(10) == 0
    assert "ERROR" not in server.text()


def test_what_stands_still_does_not_hold_up_the_end(house: Any, dummy_plan: dict[str, Any]) -> None:
    """An order half sent, the headers of one, a sign-in without a word, and who does not read what he asks for."""
    house.plan(dummy_plan)
    server = house.server()
    upgrade = (
        "GET /connect HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    order = "POST /api/runs/run/orders HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
    pings = (b"\x89\xfd" + bytes(4 + 125)) * 80_000
    asking = "GET /api/runs/none HTTP/1.1\r\nHost: x\r\n\r\n" * 2000
    with contextlib.ExitStack() as open_ones:
        for first, then in (
            (f"{order}\r\n{{", b""),
            (order, b""),
            (asking, b""),
            (upgrade, b""),
            (upgrade, pings),
        ):
            standing = open_ones.enter_context(socket.create_connection(("127.0.0.1", house.port)))
            standing.settimeout(1)
            with contextlib.suppress(TimeoutError):
                standing.sendall(first.encode())
                assert first is not upgrade or b"101" in standing.recv(100)
                standing.sendall(then)
        time.sleep(0.3)
        server.send(signal.SIGTERM)
        assert server.ended(10) == 0
    assert "Traceback" not in server.text()
    assert "ERROR" not in server.text()


def test_the_server_ends_while_it_prepares(
    house: Any, tiny_gpt: dict[str, Any], until: Callable[..., Any]
) -> None:
    house.plan(tiny_gpt, {"task.text.max_bytes": 20_000_000, "task.tokenizer.kind": "bpe"})
    server = house.server(wait=False)
    until(lambda: server.worker("prepare"), "the preparation")
    server.send(signal.SIGTERM)
    assert server.ended(10) == 0
    assert not list((house.server_home / "runs").glob("*")), "a half-made run was left"
