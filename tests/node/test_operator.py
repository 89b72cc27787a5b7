"""The operator's orders and the dashboard, on a real server: status, pause, resume, kick; and who may not."""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi import HTTPException

from manyhands.errors import ProtocolError
from manyhands.identity.canonical import sign_document
from manyhands.identity.keys import Identity, ephemeral
from manyhands.node import operator
from manyhands.node.server.http import Orders
from manyhands.node.server.run_driver import clock_ms

REFUSED, IDENTITY = 7, 5


def _slow(house: Any, dummy_plan: dict[str, Any], rounds: int) -> None:
    house.plan(dummy_plan, {"rounds.total": rounds, "task.delay_s": 0.3})


def test_pause_resume_and_status(house: Any, dummy_plan: dict[str, Any]) -> None:
    _slow(house, dummy_plan, 8)
    house.server()
    clients = [house.client("ann"), house.client("ben")]
    house.until_closed(2)

    done = house.command("server", "pause", "--server-addr", house.address)
    assert done.returncode == 0, done.stderr
    house.until_phase("paused")
    time.sleep(2.0)  # the open round still closes
    closed = house.closed()
    time.sleep(1.5)
    assert house.closed() == closed, "a paused run opens no round"

    status = house.command("server", "status", "--server-addr", house.address, "--format", "json")
    (run,) = json.loads(status.stdout)
    assert (run["run_id"], run["phase"], run["closed_rounds"]) == ("run", "paused", closed)
    shown = house.command("server", "status", "--server-addr", house.address, "--run-id", "run")
    assert "paused" in shown.stdout
    assert "ann" in shown.stdout

    done = house.command("server", "resume", "--server-addr", house.address)
    assert done.returncode == 0, done.stderr
    for client in clients:
        assert client.ended() == 0, client.text()


def test_a_kicked_client_is_out_for_good(house: Any, dummy_plan: dict[str, Any]) -> None:
    _slow(house, {**dummy_plan, "membership": {"min_clients": 1}}, 6)
    house.server()
    stays, goes = house.client("ann"), house.client("ben")
    house.until_closed(1)
    done = house.command("server", "kick", "--server-addr", house.address, "--client", goes.key[:8])
    assert done.returncode == 0, done.stderr
    assert goes.ended() == REFUSED, goes.text()
    assert "kicked" in house.incidents(goes)
    again = house.client("ben")
    assert again.ended() == REFUSED, again.text()
    assert stays.ended() == 0, stays.text()


def test_orders_need_the_operators_key(house: Any, dummy_plan: dict[str, Any]) -> None:
    _slow(house, dummy_plan, 3)
    house.server()
    other = house.key("mallory")
    done = house.command("server", "pause", "--server-addr", house.address, "--operator-key", str(other))
    assert done.returncode == REFUSED
    assert "operator" in done.stderr
    nobody = house.command("server", "pause", "--server-addr", house.address, home="nobody-home")
    assert nobody.returncode == IDENTITY
    assert "server run" in nobody.stderr
    assert house.view()["phase"] == "waiting"
    key = house.server_home / "keys" / "operator.key"
    assert key.stat().st_mode & 0o077 == 0
    unknown = house.command("server", "kick", "--server-addr", house.address, "--client", "abcdef")
    assert unknown.returncode == REFUSED
    assert "0 clients" in unknown.stderr


def test_the_dashboard_is_served_without_anything_from_elsewhere(
    house: Any, dummy_plan: dict[str, Any]
) -> None:
    _slow(house, dummy_plan, 3)
    house.server()
    with urllib.request.urlopen(f"http://{house.address}/", timeout=10) as answer:
        page = answer.read().decode()
        policy = answer.headers["Content-Security-Policy"]
    assert "manyhands" in page
    assert "https://" not in page.replace("https://www.w3.org", "")
    assert "default-src" in policy


def test_a_program_serves_and_joins(house: Any, dummy_plan: dict[str, Any]) -> None:
    """The Python API in place of the commands: serve in one process, join in another."""
    house.plan(dummy_plan, {"rounds.total": 2, "membership.min_clients": 1, "rounds.quorum": 1})
    serving = (
        "import sys, manyhands; "
        "manyhands.serve(manyhands.load_plan(sys.argv[1]), manyhands.ServerOptions(port=int(sys.argv[2])))"
    )
    joining = (
        "import sys, manyhands; from manyhands.identity.keys import ephemeral; "
        "manyhands.join(manyhands.ClientOptions(server_addr=sys.argv[1], run_id='run', identity=ephemeral(), "
        "patient=True)); print('done')"
    )
    house.start(
        house.program,
        "api-server",
        "server-home",
        sys.executable,
        "-c",
        serving,
        str(house.plan_file),
        str(house.port),
    )
    client = house.start(
        house.program, "api-client", "client-home", sys.executable, "-c", joining, house.address
    )
    assert client.ended() == 0, client.text()
    assert client.text().strip().endswith("done")
    assert house.until_phase("finished")["closed_rounds"] == 2


@pytest.fixture
def strange_server() -> Iterator[Callable[[Any], str]]:
    """answering(thing): the address of something that answers everything with that, as JSON."""
    answers: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers[-1]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    def answering(thing: Any) -> str:
        answers.append(thing)
        return f"127.0.0.1:{server.server_port}"

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield answering
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("answer", [None, 3, "x", {"runs": []}, [3], [{"run_id": "r"}], {"done": 3}])
def test_who_answers_something_else_is_no_server(strange_server: Callable[[Any], str], answer: Any) -> None:
    address = strange_server(answer)
    identity = ephemeral()
    asked: list[Callable[[], Any]] = [
        lambda: operator.status(address),
        lambda: operator.status(address, "run"),
        lambda: operator.pause(address, "run", identity),
    ]
    for ask in asked:
        with pytest.raises(ProtocolError, match=r"no manyhands server|does not fit"):
            ask()


# --------------------------------------------------------------------------------------- one order, once
def _signed(identity: Identity, **changes: Any) -> bytes:
    order = {"action": "resume", "run_id": "run", "issued_ms": clock_ms(), "nonce": "n", **changes}
    made = operator.Order.parse(order)
    signature = sign_document(identity, operator.ORDER_DOMAIN, made)
    return json.dumps({"order": made.model_dump(), "signature": signature}).encode()


def test_an_order_is_good_once_also_after_a_restart() -> None:
    identity = ephemeral()
    orders, given = Orders(identity.public), _signed(identity)
    assert orders.checked(given, "run").action == "resume"
    with pytest.raises(HTTPException, match="carried out already"):
        orders.checked(given, "run")
    orders.checked(_signed(identity, nonce="m"), "run")
    time.sleep(0.002)
    with pytest.raises(HTTPException, match="older than this server's start"):
        Orders(identity.public).checked(given, "run")


def test_orders_that_are_not_for_here() -> None:
    identity = ephemeral()
    orders = Orders(identity.public)
    for given, word in (
        (_signed(identity, run_id="other"), "another run"),
        (_signed(identity, issued_ms=clock_ms() - 61_000), "too old"),
        (_signed(ephemeral()), "not signed"),
        (b"[]", "not an order"),
    ):
        with pytest.raises(HTTPException, match=word):
            orders.checked(given, "run")
