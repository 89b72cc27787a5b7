"""`manyhands train --host` against a real sshd: the installed command here, the same program there."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manyhands.ui.bench.loopback_host import LoopbackHost
from manyhands.ui.main import run

Command = Callable[..., subprocess.CompletedProcess[str]]


def run_directory(host: LoopbackHost) -> Path:
    (found,) = (host.manyhands_home / "runs").iterdir()
    return found


def there(here: Path) -> Path:
    return Path(json.loads((here / "host.json").read_text())["parts"][0]["directory"])


# ---------------------------------------------------------------------------------------- one that ends well
def test_from_the_command_to_the_files(
    manyhands: Command, host: LoopbackHost, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    rows = "\n".join(f"{i},{i % 7},{i % 2}" for i in range(200))
    (tmp_path / "rows.csv").write_text(f"id,a,label\n{rows}\n")
    words = [w for w in tiny if "generated" not in w]
    words += [f"task.table.files=[{tmp_path / 'rows.csv'}]", "task.target=label", "run=here-and-there"]
    done = manyhands("train", "--host", "server1", "rounds.total=2", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    here = run_directory(host)
    remote = there(here)
    assert (here.name, remote.parent) == ("here-and-there", host.home / "manyhands" / "runs")

    # what is seen: each event's line, as for a training here
    for line in (
        "looking at server1",
        "started on server1, in ",
        "step 10/10: loss ",
        "validation loss",
        "finished at",
    ):
        assert line in done.stdout, done.stdout
    assert re.search(r"^validation loss \S+ -> \S+ in 10 steps, [\d,]+ samples/s$", done.stdout, re.MULTILINE)
    for made in ("checkpoints/step-00000005", "checkpoints/step-00000010", "exports/step-00000010.onnx"):
        assert re.search(rf"fetched \S+/here-and-there/{made}$", done.stdout, re.MULTILINE), done.stdout
    assert f"checkpoint {here / 'checkpoints' / 'step-00000010'}" in done.stdout.splitlines()[-1]

    # what is here: the same bytes
    assert (here / "events.jsonl").read_bytes() == (remote / "events.jsonl").read_bytes()
    for pattern in ("checkpoints/step-*/**/*", "exports/*.onnx"):
        names = {str(p.relative_to(remote)) for p in remote.glob(pattern) if p.is_file()}
        assert names
        for name in names:
            assert (here / name).read_bytes() == (remote / name).read_bytes()
    assert (remote / "inputs" / "00-rows.csv").read_text() == (tmp_path / "rows.csv").read_text()

    # from another terminal
    listed = json.loads(manyhands("hosts", "ls", "--format", "json").stdout)
    assert [h["host"] for h in listed["hosts"]] == ["server1"]
    (row,) = listed["runs"]
    assert (row["run"], row["state"], row["step"], row["fetched"]) == ("here-and-there", "finished", 10, True)
    again = manyhands("hosts", "attach", "here-and-there", "--logs", "json")
    assert again.returncode == 0
    kinds = [json.loads(line)["kind"] for line in again.stdout.splitlines()]
    assert kinds.count("finished") == 1
    assert "exported" in manyhands("hosts", "logs", "here-and-there").stdout
    assert "on server1 has ended already" in manyhands("hosts", "stop", "here-and-there").stdout
    fetched = manyhands("hosts", "fetch", str(here), "--all")
    assert fetched.returncode == 0, fetched.stderr
    assert {p.name for p in (here / "materials").iterdir()} == {
        p.name for p in (remote / "materials").iterdir()
    }

    # and on, there
    more = manyhands("train", "--host", "server1", "--resume", str(here), "--no-export")
    assert more.returncode == 0, more.stdout + more.stderr
    assert "resumed at step 10" in more.stdout


# ---------------------------------------------------------------------------------------- one that does not
@pytest.fixture
def going_on(
    host: LoopbackHost,
    started: Callable[..., Any],
    endless: tuple[str, ...],
    wait: Callable[..., Any],
) -> Iterator[tuple[Any, Path, dict[str, Any]]]:
    """A training that would take for ever, seen here, and its processes there."""
    command = started("train", "--host", "server1", *endless)
    runs = host.manyhands_home / "runs"
    here = wait(lambda: next(iter(runs.glob("*")), None) if runs.is_dir() else None, "the run's directory")
    wait(
        lambda: '"step"' in (here / "events.jsonl").read_text() if (here / "events.jsonl").exists() else None,
        "a step",
    )
    status = json.loads((there(here) / "status.json").read_text())
    yield command, here, status
    subprocess.run(["kill", "-KILL", str(status["pid"])], check=False, capture_output=True)


def test_detached_and_attached_and_stopped(
    going_on: tuple[Any, Path, dict[str, Any]],
    started: Callable[..., Any],
    manyhands: Command,
) -> None:
    command, here, _ = going_on
    command.process.send_signal(signal.SIGINT)  # there is no terminal: it detaches
    code, output = command.ended()
    assert code == 130
    assert f"goes on at server1; see it again with: manyhands hosts attach {here.name}" in output
    listed = json.loads(manyhands("hosts", "ls", "--format", "json").stdout)
    assert [row["state"] for row in listed["runs"]] == ["training"]
    attached = started("hosts", "attach", here.name)
    assert "is asked to save and end" in manyhands("hosts", "stop", here.name).stdout
    code, output = attached.ended()
    assert code == 130
    assert "\nthe training on server1 was asked to end, and has ended\n" in f"\n{output}"
    assert "interrupted after step" in (here / "logs" / "server1.log").read_text()
    assert list((here / "checkpoints").glob("step-*"))
    assert re.search(
        rf"^go on with: manyhands train --host=server1 --resume \S*{here.name}$", output, re.MULTILINE
    )
    assert [
        row["state"] for row in json.loads(manyhands("hosts", "ls", "--format", "json").stdout)["runs"]
    ] == ["stopped"]


# ---------------------------------------------------------------------------------------- what is refused before
@pytest.mark.parametrize(
    ("arguments", "entry", "code", "words"),
    [
        (["--host", "sever1"], {}, 3, "there is no host 'sever1' in .*Did you mean 'server1'.*Known: server1"),
        (["--devices", "3"], {}, 12, r"server1 has no GPU 3 \(it has: none\): choose another with --devices"),
        ([], {"Devices": [1]}, 12, r"server1 has no GPU 1"),
        (["--shards", "/nowhere/shards"], {}, 4, "--shards is the directory as server1 sees it; send one"),
        (["task=grids", "task.evaluation=[{name: a, path: /nowhere/s}]"], {}, 4, "server1 has no /nowhere/s: give"),
        ([], {"WorkDir": "/proc/x"}, 9, "(are free at /proc/x, .* or|/proc/x cannot be written:) choose another"),
        ([], {"Python": "/usr/bin/python3"}, 12, "server1 has no manyhands for /usr/bin/python3: .*hosts setup"),
        (["--host", "server1", "--host", "server1"], {}, 2, "one training on several hosts is --host="),
    ],
)  # fmt: skip
def test_nothing_is_started_where_something_is_wrong(
    capsys: pytest.CaptureFixture[str],
    host: LoopbackHost,
    tiny: tuple[str, ...],
    arguments: list[str],
    entry: dict[str, Any],
    code: int,
    words: str,
) -> None:
    host.write_hosts(**entry)
    before = set((host.home / "manyhands").glob("runs/*"))
    named = [] if "--host" in arguments else ["--host", "server1"]
    given = arguments if "task=grids" in arguments else [*tiny, *arguments]
    assert run(["train", *named, *given]) == code
    assert re.search(words, capsys.readouterr().err.replace("\n", " "))
    assert not (host.manyhands_home / "runs").exists()
    assert set((host.home / "manyhands").glob("runs/*")) == before


def test_another_version_there(
    host: LoopbackHost, manyhands: Command, tiny: tuple[str, ...], place_of_both: Path
) -> None:
    other = place_of_both / "other" / "manyhands-0.0.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: manyhands\nVersion: 0.0.9\n")
    python = place_of_both / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={other.parent} exec python3 "$@"\n')
    python.chmod(0o755)
    host.write_hosts(Python=str(python))
    done = manyhands("train", "--host", "server1", *tiny)
    assert done.returncode == 7
    assert re.search(
        r"server1 has manyhands 0\.0\.9, and here it is .* `manyhands hosts setup server1`", done.stderr
    )
    checked = manyhands("hosts", "check", "server1", "--format", "json")
    assert checked.returncode == 12
    (fault,) = (row for row in json.loads(checked.stdout) if row["state"] == "fault")
    assert fault["what"] == "manyhands"
    assert fault["to_do"].startswith("manyhands hosts setup server1, and then leave")
