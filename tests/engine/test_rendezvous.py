from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from manyhands.engine.refusal import FILE as REFUSAL
from manyhands.engine.refusal import leave_refusal, refusal_in
from manyhands.engine.rendezvous import FILE, meet
from manyhands.errors import RankLost, Refused, WorkerError


def together(directory: Path, ranks: list[tuple[int, int]], wait_s: float = 20.0) -> list[Any]:
    """What came of each (rank, world_size), started at once: a store, or the error."""

    def one(place: tuple[int, int]) -> Any:
        try:
            return meet(directory, *place, wait_s=wait_s)
        except (Refused, WorkerError) as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_all_ranks_meet_in_one_store(tmp_path: Path) -> None:
    first, second, third = together(tmp_path / "run", [(0, 3), (1, 3), (2, 3)])
    first.set("who", "rank 0")
    assert second.get("who") == third.get("who") == b"rank 0"


def test_what_an_earlier_start_left_behind_does_no_harm(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    stale = {"address": "127.0.0.1", "port": port, "token": "old"}
    (tmp_path / FILE).write_text(json.dumps(stale))
    stores = together(tmp_path, [(1, 2), (0, 2)])
    assert not any(isinstance(store, Exception) for store in stores), stores
    assert json.loads((tmp_path / FILE).read_text())["token"] != "old"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"address": 1}'])
def test_a_file_that_makes_no_sense_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    stores = together(tmp_path, [(0, 2), (1, 2)])
    assert not any(isinstance(store, Exception) for store in stores), stores


def test_two_trainings_do_not_meet_in_one_directory(tmp_path: Path) -> None:
    kept = together(tmp_path, [(0, 2), (1, 2)])
    with pytest.raises(Refused, match=r"another training meets in .*run=NAME"):
        meet(tmp_path, 0, 2, wait_s=5)
    assert kept[0].get("token") == kept[1].get("token")


def test_who_is_missing_is_named(tmp_path: Path) -> None:
    first, second = together(tmp_path, [(0, 4), (2, 4)], wait_s=3)
    for error in (first, second):
        assert isinstance(error, WorkerError)
        assert "rank 1, 3 of 4 did not come within 3 s" in str(error) or "lost" in str(error)
    assert "rank 1, 3" in str(first)
    with pytest.raises(WorkerError, match=r"rank 1 of 2 found no rank 0 in .*nowhere within 0\.3 s"):
        meet(tmp_path / "nowhere", 1, 2, wait_s=0.3)


def test_ranks_that_disagree_about_their_number_are_told(tmp_path: Path) -> None:
    began = time.monotonic()
    came = together(tmp_path, [(0, 2), (1, 3)])
    assert {str(error) for error in came} == {
        "rank 1 was started with world_size=3, rank 0 with 2: start all with the same"
    }
    assert time.monotonic() - began < 10


def test_so_are_those_that_meet_at_an_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def one(place: tuple[int, int]) -> str:
        with pytest.raises(WorkerError) as error:
            meet(tmp_path, *place, wait_s=20, address="127.0.0.1", port=port)
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        for told in pool.map(one, [(0, 2), (1, 3)]):
            assert "rank 1 was started with world_size=3, rank 0 with 2" in told


@pytest.mark.parametrize(("waits", "refuses"), [(1, 0), (0, 1)])
def test_who_refuses_to_come_ends_those_that_wait(tmp_path: Path, waits: int, refuses: int) -> None:
    leave_refusal(tmp_path, refuses, "an earlier start's reason")
    earlier = refusal_in(tmp_path)
    refusal = threading.Timer(1, leave_refusal, (tmp_path, refuses, "the reason"))
    refusal.start()
    with pytest.raises(RankLost, match=f"^rank {refuses} ended before the ranks met: the reason$"):
        meet(tmp_path, waits, 2, wait_s=20, earlier=earlier)
    refusal.join()


def test_what_an_earlier_start_refused_does_no_harm(tmp_path: Path) -> None:
    leave_refusal(tmp_path, 1, "an earlier start's reason")
    earlier = refusal_in(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(lambda rank: meet(tmp_path, rank, 2, wait_s=20, earlier=earlier), (0, 1)))
    assert len(stores) == 2
    assert not (tmp_path / REFUSAL).exists(), "they have met"


def test_another_start_of_rank_0_does_not_end_those_that_have_found_theirs(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(meet, tmp_path, rank, 3, wait_s=20) for rank in (0, 1)]
        time.sleep(1)
        leave_refusal(tmp_path, 0, "not theirs")
        time.sleep(0.5)
        third = meet(tmp_path, 2, 3, wait_s=20)
        assert waiting[0].result().get("token") == third.get("token")


def test_the_same_rank_twice_is_refused(tmp_path: Path) -> None:
    came = together(tmp_path, [(0, 3), (1, 3), (1, 3)], wait_s=3)
    assert sum("started twice" in str(each) for each in came) == 1


def test_a_rank_0_that_does_not_come_to_its_address_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(
        WorkerError, match=rf"rank 1 of 2 found nobody at 127.0.0.1:{port} within 1 s .*start rank 0"
    ):
        meet(tmp_path, 1, 2, wait_s=1, address="127.0.0.1", port=port)
    assert time.monotonic() - began < 3


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(WorkerError, match=f"port {port} at 127.0.0.1 cannot be opened"):
            meet(tmp_path, 0, 2, wait_s=2, address="127.0.0.1", port=port)


def test_a_given_address_needs_no_file(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    stores: list[Any] = []
    ranks = [
        threading.Thread(
            target=lambda r: stores.append(meet(tmp_path, r, 2, wait_s=10, address="127.0.0.1", port=port)),
            args=(rank,),
        )
        for rank in (1, 0)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(stores) == 2
    assert not (tmp_path / FILE).exists()


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a program that takes every connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield int(other.getsockname()[1])


def test_a_port_of_another_program_is_no_rank_0(tmp_path: Path, silent: int) -> None:
    begun = time.monotonic()
    with pytest.raises(
        WorkerError, match=r"rank 1 of 2: what answers at 127\.0\.0\.1:\d+ is no rank 0 of a training"
    ):
        meet(tmp_path, 1, 2, wait_s=2, address="127.0.0.1", port=silent)
    assert time.monotonic() - begun < 15


def test_a_port_that_another_program_has_now_is_stale(tmp_path: Path, silent: int) -> None:
    (tmp_path / FILE).write_text(json.dumps({"address": "127.0.0.1", "port": silent, "token": "of old"}))
    begun = time.monotonic()
    stores = together(tmp_path, [(0, 2), (1, 2)])
    assert not any(isinstance(store, Exception) for store in stores), stores
    assert time.monotonic() - begun < 20
