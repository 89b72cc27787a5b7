"""kill -9 and SIGSTOP of the programs behind a node: the node keeps its place, and the run its pace."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from manyhands import simulate

pytestmark = pytest.mark.chaos
INT8 = {"codec": {"name": "int8", "error_feedback": True}, "change_codec": {"name": "int8"}}


def test_a_worker_that_is_killed_at_work_is_started_again_where_it_was(
    house: Any, tiny_gpt: dict[str, Any], until: Callable[..., Any]
) -> None:
    """Twice; the node keeps its session, and the local state is that after the last work."""
    house.plan(
        tiny_gpt,
        {**INT8, "preset": "diloco", "membership.min_clients": 2, "rounds.total": 5, "local.steps": 30},
    )
    server = house.server()
    ann, ben = house.client("ann"), house.client("ben")
    killed: list[int] = []
    for number in (1, 3):
        until(lambda number=number: ben.said("progress") and ben.said("work", round=number), "work")
        worker = ben.worker("client")
        assert worker is not None
        worker.kill()
        killed.append(worker.pid)
    for client in (ann, ben):
        assert client.ended() == 0, client.text()
    house.until_phase("finished")
    assert len(set(killed)) == len(ben.said("worker_died")) == 2
    assert house.incidents(ben) == ["joined"] or "rejoined" not in house.incidents(ben)
    rounds = house.ledger()
    assert house.counted(ben) == list(range(5)), "no round was lost"
    claims = [w["contribution"]["claims"] for r in rounds for w in r["works"] if w["contribution"]]
    assert [c["start"] for c in claims].count("fresh") == 2, "nobody had to start afresh"
    server.send(signal.SIGTERM)
    assert server.ended(10) == 0
    assert simulate(ledger="run", data_dir=house.server_home / "server").equal


def test_a_worker_that_always_dies_ends_its_client_and_not_the_run(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    house.plan(dummy_plan, {"rounds.total": 500, "task.delay_s": 1.0, "membership.min_clients": 1})
    house.server()
    ann, ben = house.client("ann"), house.client("ben")
    until(lambda: house.counted(ben), "a contribution")
    seen: set[int] = set()
    end = time.monotonic() + 60
    while ben.process.poll() is None and time.monotonic() < end:
        worker = ben.worker("dummy")
        if worker is not None and worker.pid not in seen:
            seen.add(worker.pid)
            worker.kill()
        time.sleep(0.02)
    assert ben.ended() == 12, ben.text()
    assert "the worker died 6 times in ten minutes" in ben.text()
    before = house.closed()
    house.until_closed(before + 2)
    assert ann.process.poll() is None


def test_an_aggregator_that_is_killed(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    """Between two rounds, while it merges, and before it has said what the round came to. The model is so large that
    the moment is met; its files show what it is at."""
    house.plan(dummy_plan, {"rounds.total": 7, "task.parameters": 8_000_000, "task.delay_s": 0.2})
    server = house.server()
    ann, ben = house.client("ann"), house.client("ben")
    place = house.server_home / "runs" / "run" / "server" / "aggregator"
    killed: list[int] = []
    for number, moment in ((1, "idle"), (3, "merging"), (5, "before Advanced")):
        house.until_closed(number)
        aggregator = until(lambda: server.worker("aggregator"), "the aggregator to be back")
        if moment == "merging":
            until(lambda number=number: _opened(house, ann, ben, number), "an update to merge")
        elif moment == "before Advanced":
            until(lambda number=number: _changing(place, number) or house.closed() > number, "the change")
        aggregator.kill()
        killed.append(aggregator.pid)
    for client in (ann, ben):
        assert client.ended() == 0, client.text()
    house.until_phase("finished")
    rounds = house.ledger()
    assert [len(row["closing"]["counted"]) for row in rounds] == [2] * 7, "nothing was lost"
    assert len({row["fingerprint"] for row in rounds}) == 7
    assert all("rejoined" not in house.incidents(client) for client in (ann, ben))
    assert all("resynced" not in house.incidents(client) for client in (ann, ben))
    assert len(set(killed)) == 3
    assert server.text().count("the aggregator of run") == 3


def _opened(house: Any, ann: Any, ben: Any, number: int) -> bool:
    return bool(ann.said("sent", round=number) or ben.said("sent", round=number)) or house.closed() > number


def _changing(place: Path, number: int) -> bool:
    return any(place.glob(f".change-{number}*")) or (place / f"change-{number}.safetensors").exists()


# ----------------------------------------------------------------------------------------------- SIGSTOP
def test_a_client_that_stands_still_is_not_waited_for_and_goes_on_afterwards(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    house.plan(
        dummy_plan,
        {
            "rounds.total": 500,
            "task.delay_s": 0.5,
            "membership.min_clients": 1,
            "rounds.suspected_after_s": 1.0,
            "rounds.first_deadline_s": 300,
            "rounds.deadline_floor_s": 300,
        },
    )
    house.server()
    ann, ben = house.client("ann"), house.client("ben")
    until(lambda: house.counted(ben), "a contribution")
    _stop(ben)
    until(lambda: house.member(ben)["suspected"], "the suspicion", 20)
    before = house.closed()
    house.until_closed(before + 3)  # long before any deadline
    assert house.member(ben)["status"] == "ready", "suspected is not lost"
    _go_on(ben)
    before = house.closed()
    until(lambda: house.counted(ben, before), "contributions after it")
    happened = house.incidents(ben)
    assert happened.index("recovered") > happened.index("suspected")
    assert not {"rejoined", "lost"} & set(happened)
    assert ann.process.poll() is None


def test_a_client_that_was_given_up_comes_back_by_itself(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    house.plan(
        dummy_plan,
        {
            "rounds.total": 500,
            "task.delay_s": 1.0,
            "membership.min_clients": 1,
            "rounds.suspected_after_s": 1.0,
            "rounds.lost_after_s": 3.0,
        },
    )
    house.server()
    house.client("ann")
    ben = house.client("ben")
    until(lambda: house.counted(ben), "a contribution")
    until(lambda: ben.said("work")[-1]["round"] == house.closed(), "it to be at work")
    _stop(ben)
    until(lambda: house.member(ben)["status"] == "lost", "it to be given up", 30)
    # Its range went back when its round closed without it, long before it was given up.
    given_back = [w for r in house.ledger() for w in r["works"] if not w["counted"]]
    assert given_back[0]["assignment"]["client"] == ben.key
    assert given_back[0]["reason"] == "not there when the round closed"
    _go_on(ben)
    before = house.closed()
    until(lambda: house.counted(ben, before), "contributions after it")
    happened = house.incidents(ben)
    assert happened.index("rejoined") > happened.index("lost")
    assert ben.said("dismissed") or ben.said("disconnected")
    assert ben.process.poll() is None


def test_workers_that_hang_are_started_again(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    """A client's while it works, and the aggregator's: nobody dies, and nobody answers."""
    house.plan(dummy_plan, {"rounds.total": 6, "task.delay_s": 0.5, "membership.min_clients": 1})
    serving = (
        "import sys, manyhands; options = manyhands.ServerOptions(port=int(sys.argv[2]), worker_silence_s=2); "
        "manyhands.serve(manyhands.load_plan(sys.argv[1]), options)"
    )
    joining = (
        "import json, sys, manyhands; from pathlib import Path; from manyhands.identity.keys import load; "
        "manyhands.join(manyhands.ClientOptions(server_addr=sys.argv[1], run_id='run', worker_silence_s=2, "
        "identity=load(Path(sys.argv[2])), on_event=lambda event: print(json.dumps(event), flush=True)))"
    )
    python = (sys.executable, "-c")
    arguments = (*python, serving, str(house.plan_file), str(house.port))
    server = house.start(house.program, "server", "server-home", *arguments)
    until(house.answers, "the server to answer")
    key = house.key("ann")
    ann = house.start(house.client_program, "ann", "ann-home", *python, joining, house.address, str(key))
    until(lambda: ann.said("work", round=1), "work")
    hung = [ann.worker("dummy")]
    hung[0].suspend()
    house.until_closed(3)
    hung.append(server.worker("aggregator"))
    hung[1].suspend()
    assert ann.ended() == 0, ann.text()
    house.until_phase("finished")
    assert not any(process.is_running() for process in hung)
    assert "had not answered for 2 s" in ann.said("worker_died")[0]["text"]
    assert f"worker process {hung[1].pid} has not answered for 2 s: it is killed" in server.text()
    assert [len(row["closing"]["counted"]) for row in house.ledger()] == [1] * 6, "nothing was lost"


def _stop(client: Any) -> None:
    """The node and its worker."""
    for process in (psutil.Process(client.pid), *client.look_at_children()):
        os.kill(process.pid, signal.SIGSTOP)


def _go_on(client: Any) -> None:
    for process in (*client.look_at_children(), psutil.Process(client.pid)):
        os.kill(process.pid, signal.SIGCONT)
