"""How a training ended is told whatever comes of its files. The host is a stand-in: what it says is in the test."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from manyhands.errors import StorageError
from manyhands.hosts.fetch import Fetched
from manyhands.hosts.follow import Follower
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.record import Part, Record, recorded
from manyhands.hosts.watching import Outcome, watch, words_of

RECORD = Record(run="a-run", parts=(Part(host="server1", directory="/runs/a-run"),))
KILLED = {"state": "ended", "signal": 9, "exit_code": 137, "out_of_memory": True, "tail": ["step 7"]}


class _Told:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, event: dict[str, Any]) -> None: ...

    def line(self, host: str, text: str) -> None: ...

    def tell(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`ending`: what the host says at last; `fault`: what a fetch raises, `events`: those before the end."""
    said: dict[str, Any] = {"ending": KILLED, "fault": None, "events": []}

    async def until_its_end(follower: Follower) -> dict[str, Any]:
        for event in said["events"]:
            follower._on_event(event)
        ending: dict[str, Any] = said["ending"]
        return ending

    async def fetch(*_arguments: object, **_settings: object) -> Fetched:
        if said["fault"] is not None:
            raise said["fault"]
        return Fetched()

    monkeypatch.setattr(Follower, "until_its_end", until_its_end)
    monkeypatch.setattr("manyhands.hosts.watching.fetch", fetch)
    monkeypatch.setattr("manyhands.hosts.watching.host_named", lambda name: Host(host_name=name))
    return said


def watched(directory: Path) -> tuple[Outcome, list[str], bool]:
    """The outcome, what was told, and whether the record says that all has come."""
    told = _Told()
    outcome = asyncio.run(asyncio.wait_for(watch(directory, RECORD, told, replay=False), 20))
    record = recorded(directory)
    assert record is not None
    return outcome, told.texts, record.fetched


def test_a_full_disk_here_does_not_hide_how_it_ended(there: dict[str, Any], tmp_path: Path) -> None:
    there["fault"] = StorageError("no space left; free space here")
    outcome, told, fetched = watched(tmp_path)
    assert (outcome.exit_code, outcome.endings["server1"]["tail"]) == (137, ["step 7"])
    assert told == [
        "not fetched: no space left; free space here; try again with `manyhands hosts fetch a-run`"
    ]
    assert not fetched


def test_one_that_ended_well_fails_when_its_files_do_not_come(there: dict[str, Any], tmp_path: Path) -> None:
    there |= {"ending": {"state": "ended", "exit_code": 0}, "fault": StorageError("no space left")}
    with pytest.raises(StorageError):
        watched(tmp_path)
    record = recorded(tmp_path)
    assert record is not None
    assert record.ended
    assert not record.fetched


def test_a_lost_disk_there_is_told_as_such(there: dict[str, Any], tmp_path: Path) -> None:
    there |= {
        "ending": {"state": "gone", "tail": ["step 7"]},
        "fault": StorageError("is not on the host any more"),
    }
    outcome, told, fetched = watched(tmp_path)
    assert "the run's directory on server1 is gone" in words_of("server1", outcome.endings["server1"])
    assert (told, fetched) == ([], False)


@pytest.mark.parametrize("came", [True, False])
def test_all_has_come_only_with_the_newest_checkpoint(
    there: dict[str, Any], tmp_path: Path, came: bool
) -> None:
    there["events"] = [{"kind": "saved", "checkpoint": "checkpoints/step-00000007"}]
    (tmp_path / "checkpoints" / ("step-00000007" if came else "step-00000006")).mkdir(parents=True)
    _, told, fetched = watched(tmp_path)
    assert fetched is came
    assert any("it has not come" in text for text in told) is not came


@pytest.mark.usefixtures("there")
def test_a_graph_is_fetched_when_its_export_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only with the next checkpoint, or at the end."""
    came: list[str] = []

    async def fetch(*_arguments: object, **_settings: object) -> Fetched:
        came.append("fetched")
        return Fetched(graphs=["exports/step-00000010.onnx"])

    async def until_its_end(follower: Follower) -> dict[str, Any]:
        for status in (
            {"phase": "training"},
            {"phase": "training", "exports": 1},
            {"phase": "training", "exports": 1},
        ):
            follower._on_status(status)
            for _ in range(5):
                await asyncio.sleep(0)
        came.append("ended")
        return {"state": "ended", "exit_code": 0}

    monkeypatch.setattr("manyhands.hosts.watching.fetch", fetch)
    monkeypatch.setattr(Follower, "until_its_end", until_its_end)
    _, told, _ = watched(tmp_path)
    assert came == ["fetched", "ended", "fetched"]
    assert told[0] == f"fetched {tmp_path / 'exports/step-00000010.onnx'}"


@pytest.mark.usefixtures("there")
def test_a_training_that_hangs_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def until_its_end(follower: Follower) -> dict[str, Any]:
        for step in (1, 2):
            follower._on_event({"kind": "step", "step": step})
            await asyncio.sleep(1.0)
        return {"state": "ended", "exit_code": 0}

    monkeypatch.setattr("manyhands.hosts.watching.QUIET_S", 0.3)
    monkeypatch.setattr(Follower, "until_its_end", until_its_end)
    _, told, _ = watched(tmp_path)
    assert len(told) == 2, told
    for text in told:
        assert "nothing has come from server1 for 0 s" in text
        assert "manyhands hosts stop a-run --now" in text


@pytest.mark.usefixtures("there")
def test_a_record_that_cannot_be_kept_does_not_hide_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RECORD.keep_in(tmp_path)

    def full(_record: Record, _directory: Path) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(Record, "keep_in", full)
    outcome, told, _ = watched(tmp_path)
    assert outcome.exit_code == 137
    assert "no space left" in told


def test_a_fault_of_fetching_is_told_once(
    there: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def some_time(follower: Follower) -> dict[str, Any]:
        follower._on_event({"kind": "saved", "checkpoint": "step-00000007"})
        await asyncio.sleep(0.3)
        return KILLED

    there["fault"] = StorageError("a fault")
    monkeypatch.setattr(Follower, "until_its_end", some_time)
    monkeypatch.setattr("manyhands.hosts.watching._LOOK_AGAIN_S", 0.01)
    _, told, _ = watched(tmp_path)
    assert told[0] == "not fetched yet: a fault"
    assert len(told) == 2


def test_when_one_has_failed_one_that_hangs_is_ended_and_one_that_makes_graphs_is_not(
    there: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []
    killed = asyncio.Event()

    async def until_its_end(follower: Follower) -> dict[str, Any]:
        match follower._host.host_name:
            case "fails":
                return KILLED
            case "exports":
                follower._on_status({"state": "running", "phase": "exporting"})
                await asyncio.wait_for(killed.wait(), 10)
                return {"state": "ended", "exit_code": 130}
        await asyncio.wait_for(killed.wait(), 10)
        return {"state": "ended", "exit_code": 137, "at_once": True}

    async def stop(part: Part, *, now: bool) -> dict[str, Any]:
        asked.append((part.host, now))
        if part.host == "hangs" and now:
            killed.set()
        return {"state": "running"}

    monkeypatch.setattr(Follower, "until_its_end", until_its_end)
    monkeypatch.setattr("manyhands.hosts.watching.stop", stop)
    monkeypatch.setattr("manyhands.hosts.watching.GRACE_S", 0.2)
    parts = tuple(Part(host=name, directory="/r") for name in ("exports", "fails", "hangs"))
    record = Record(run="three", parts=parts)
    outcome = asyncio.run(watch(tmp_path, record, _Told(), replay=False))
    assert outcome.exit_code == 137
    assert ("hangs", True) in asked
    assert ("exports", True) not in asked
    assert there["fault"] is None
