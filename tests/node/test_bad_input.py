"""What people and strangers get wrong: a clear word, an exit code, and nothing lost for those who did nothing
wrong. Exit codes: docs/reference/exit-codes.md."""

from __future__ import annotations

import json
import secrets
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from manyhands.plan.descriptor import RunDescriptor
from manyhands.storage.database import open_database
from manyhands.storage.events import RunLog
from manyhands.storage.runs import get_run


# --------------------------------------------------------------------------------------- starting a server
@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"rounds.totl": 3}, 3, ["totl", "did you mean", "total"]),
        ({"local.steps": "many"}, 3, ["local.steps", "many"]),
        ({"topology": "mesh", "change_codec": {"name": "int8"}}, 3, ["change_codec", "mesh"]),
        ({"task": {"name": "custom", "target": "os:system"}}, 3, ["os:system", "--allow-task"]),
        ({"task": {"name": "language_model", "text": {"path": "/nowhere/at-all"}}}, 4, ["/nowhere/at-all"]),
    ],
    ids=["unknown key", "ill-typed", "does not go together", "names code", "no such text"],
)
def test_a_plan_that_cannot_be(
    house: Any, dummy_plan: dict[str, Any], changes: dict[str, Any], code: int, words: list[str]
) -> None:
    house.plan(dummy_plan, changes)
    server = house.server(wait=False)
    assert server.ended() == code, server.text()
    for word in words:
        assert word.lower() in server.text().lower()
    assert not list((house.server_home / "runs").glob("*")), "a half-made run was left"


def test_a_text_that_is_empty(house: Any, tiny_gpt: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    house.plan(tiny_gpt, {"task.text.path": str(tmp_path / "empty.txt")})
    server = house.server(wait=False)
    assert server.ended() == 4, server.text()
    assert "empty.txt" in server.text()
    assert not list((house.server_home / "runs").glob("*"))
    # The same command with a text that is there goes on as if nothing had been.
    house.plan(tiny_gpt)
    house.server()


def test_a_port_in_use_and_a_plan_that_has_changed(house: Any, dummy_plan: dict[str, Any]) -> None:
    house.plan(dummy_plan)
    first = house.server()
    second = house.server(wait=False)
    assert second.ended() == 6
    assert "--port" in second.text()
    assert house.view()["phase"] == "waiting", "the first one is not disturbed"
    first.send(signal.SIGTERM)
    assert first.ended(10) == 0
    house.plan(dummy_plan, {"rounds.total": 4})
    other = house.server(wait=False)
    assert other.ended() == 3
    assert "run 'run' exists with another plan" in other.text()


# --------------------------------------------------------------------------------------- starting a client
def test_nobody_answers(house: Any) -> None:
    client = house.client("ann")
    assert client.ended() == 6, client.text()
    assert house.address in client.text()


def test_a_patient_client_waits_for_a_server_that_is_not_there_yet(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    client = house.client("ann", "--patient")
    until(lambda: client.said("disconnected"), "the client to say that it waits")
    house.plan(dummy_plan, {"membership.min_clients": 1})
    house.server()
    assert client.ended() == 0, client.text()


def test_keys_that_are_no_keys(house: Any, tmp_path: Path) -> None:
    short = tmp_path / "short.key"
    short.write_bytes(b"too short")
    short.chmod(0o600)
    open_to_all = house.key("open")
    open_to_all.chmod(0o644)
    for path, word in ((short, "9"), (open_to_all, f"chmod 600 {open_to_all}"), (tmp_path / "none", "none")):
        arguments = ("--server-addr", house.address, "--identity-secret-key-path", str(path))
        done = house.command("client", "train", "--run-id", "run", *arguments, home="client-home")
        assert done.returncode == 5, done.stderr
        assert word in done.stderr


# ------------------------------------------------------------------------- wrong with a run that goes on
def test_who_does_not_belong_is_told_why_and_the_run_goes_on(house: Any, dummy_plan: dict[str, Any]) -> None:
    house.plan(dummy_plan, {"rounds.total": 500, "task.delay_s": 0.3})
    house.server()
    honest = [house.client("ann"), house.client("ben")]
    house.until_closed(1)

    lost = house.client("cleo", run_id="other")
    assert lost.ended() == 7
    assert "no run 'other'" in lost.text()
    assert "its runs: run" in lost.text()
    assert not list((house.place / "cleo-home" / "runs").glob("*")), "a directory of no run was left"

    kept = house.place / "dora-home" / "runs" / "run" / house.public("dora")[:8]
    kept.mkdir(parents=True)
    (kept / "run.json").write_text(json.dumps({"plan_hash": "ab" * 32}))
    stale = house.client("dora")
    assert stale.ended() == 7
    assert "abababab" in stale.text()

    wrong = house.client("emil", "--server-key", "cd" * 32)
    assert wrong.ended() == 7
    assert "cdcdcdcd" in wrong.text()

    pinned = house.place / "finn-home" / "keys" / "known_servers.json"
    pinned.parent.mkdir(parents=True)
    pinned.write_text(json.dumps({"version": 1, "servers": {house.address: "ef" * 32}}))
    pinned.chmod(0o600)
    doubtful = house.client("finn")
    assert doubtful.ended() == 7
    assert "efefefef" in doubtful.text()

    for hello, word in _first_words(house).items():
        assert word in _say(house, hello), hello

    before = house.closed()
    house.until_closed(before + 2)
    members = {c["key"] for c in house.view()["clients"]}
    assert members == {c.key for c in honest}, "none of the others has become a member"
    assert all("suspected" not in house.incidents(c)[1:2] for c in honest)


def _hello(house: Any, **changes: Any) -> str:
    hello = {
        "type": "hello",
        "versions": [1],
        "run_id": "run",
        "client": house.public("ann"),
        "nonce": secrets.token_hex(32),
        "boot": secrets.token_hex(16),
        **changes,
    }
    return json.dumps(hello)


def _first_words(house: Any) -> dict[str | bytes, str]:
    """What a stranger may say first, and a word of the answer."""
    return {
        _hello(
            house, versions=[98, 99]
        ): "no common protocol version: the client speaks 98, 99, the server 1",
        _hello(house, versions=[]): "versions",
        _hello(house, run_id="../../etc"): "run_id",
        _hello(house, more="x"): "more",
        '{"type": "heartbeat"}': "expected 'hello' first",
        "not json": "JSON",
        "[" * 100_000: "JSON",
        b"\x00\x01": "binary",
    }


def _say(house: Any, text: str | bytes) -> str:
    """The reason of a final rejection."""
    with connect(f"ws://{house.address}/connect", compression=None) as socket:
        socket.send(text)
        answer = json.loads(socket.recv(10))
        assert answer["type"] == "rejected", answer
        assert answer["final"]
        return str(answer["reason"])


def test_a_stranger_who_cannot_prove_the_key_that_he_names(house: Any, dummy_plan: dict[str, Any]) -> None:
    house.plan(dummy_plan)
    house.server()
    with connect(f"ws://{house.address}/connect", compression=None) as socket:
        socket.send(_hello(house))
        assert json.loads(socket.recv(10))["type"] == "challenge"
        socket.send(json.dumps({"type": "proof", "signature": "00" * 64}))
        answer = json.loads(socket.recv(10))
        assert answer["type"] == "rejected"
        assert "could not prove" in answer["reason"]
        with pytest.raises(ConnectionClosed):
            socket.recv(10)
    with connect(f"ws://{house.address}/connect", compression=None) as socket:
        socket.send("x" * 300_000)  # more than a message may have
        assert "300000 bytes; at most 262144" in json.loads(socket.recv(10))["reason"]
        with pytest.raises(ConnectionClosed):
            socket.recv(10)
    assert house.view()["clients"] == []


def test_the_same_key_twice(house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]) -> None:
    """From one directory it is refused; from two the second one waits until the first one has gone."""
    house.plan(dummy_plan, {"rounds.total": 500, "task.delay_s": 0.3})
    house.server()
    first, _ = house.client("ann"), house.client("ben")
    house.until_closed(1)
    again = house.client("ann")
    assert again.ended() == 7
    assert f"in use by process {first.pid}" in again.text()

    second = house.client("anna", key="ann")
    waiting = until(lambda: second.said("waiting"), "the second one to say that it waits")
    assert "another process takes part with this key" in waiting[0]["text"]
    before = house.closed()
    house.until_closed(before + 2)
    assert "rejoined" not in house.incidents(first)
    first.kill()
    until(lambda: second.said("joined"), "the second one to take over")
    before = house.closed()
    until(lambda: house.counted(second, before), "its contributions")
    assert house.incidents(second).count("rejoined") == 1


def test_a_finished_run_is_no_error(house: Any, dummy_plan: dict[str, Any]) -> None:
    house.plan(dummy_plan, {"rounds.total": 1, "membership.min_clients": 1})
    house.server()
    assert house.client("ann").ended() == 0
    house.until_phase("finished")
    for name in ("ann", "ben"):  # one that took part, one that did not
        late = house.client(name)
        assert late.ended() == 0, late.text()
        assert late.said("finished")
        assert "finished" in late.said("finished")[0]["text"]
    assert len(house.view()["clients"]) == 1


def test_who_was_away_when_the_run_finished_still_hears_of_it(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    """SIGSTOP stands for any absence: the process is the same, and ends by itself as soon as it can."""
    house.plan(
        dummy_plan, {"rounds.total": 4, "task.delay_s": 0.3, "membership.min_clients": 1, "rounds.quorum": 1}
    )
    house.server()
    staying, away = house.client("ann"), house.client("ben")
    until(lambda: house.counted(away), "a contribution")
    away.send(signal.SIGSTOP)
    assert staying.ended() == 0
    house.until_phase("finished")
    away.send(signal.SIGCONT)
    assert away.ended() == 0, away.text()
    assert away.said("finished")


def test_a_snapshot_that_the_disk_has_spoiled(house: Any, dummy_plan: dict[str, Any]) -> None:
    """Whoever needs it says so and ends; those who have it go on."""
    changes = {"rounds.total": 500, "task.delay_s": 0.3, "rounds.snapshot_every": 400}
    house.plan(dummy_plan, {**changes, "membership.min_clients": 1})
    house.server()
    ann = house.client("ann")
    house.until_closed(1)
    database = open_database(house.server_home / "server" / "manyhands.db", create=False)
    name = RunDescriptor.model_validate_json(get_run(database, "run").descriptor).first_snapshot.blob
    database.close()
    with (house.server_home / "server" / "blobs" / "objects" / name[:2] / name).open("r+b") as file:
        file.seek(500_000)
        file.write(b"spoiled")
    ben = house.client("ben")
    assert ben.ended() == 10, ben.text()
    assert name in ben.text()
    before = house.closed()
    house.until_closed(before + 2)
    assert ann.process.poll() is None


def test_a_directory_in_use_and_a_run_that_was_taken_over(house: Any, dummy_plan: dict[str, Any]) -> None:
    """One server at a time owns a run. The clients of one that has lost it wait for the one that has it."""
    house.plan(dummy_plan, {"rounds.total": 500, "task.delay_s": 0.3, "membership.min_clients": 1})
    server, client = house.server(), house.client("ann")
    house.until_closed(1)
    plan = ("--plan", str(house.plan_file), "--port", "0")
    beside = house.command("server", "run", *plan)
    assert beside.returncode == 7
    assert f"in use by process {server.pid}" in beside.stderr
    assert "another directory" in beside.stderr

    database = open_database(house.server_home / "server" / "manyhands.db", create=False)
    RunLog(database, "run").acquire("127.0.0.1:9")
    database.close()
    assert server.ended(30) == 9
    assert "it is now at 127.0.0.1:9" in server.text()
    house.server()  # takes it over in its turn
    before = house.closed()
    house.until_closed(before + 2)
    assert client.process.poll() is None
    assert "rejoined" not in house.incidents(client)
