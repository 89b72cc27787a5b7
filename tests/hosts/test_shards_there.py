"""`train --host` on shards: those of this machine, sent there, and those that lie there; the installed command."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands.ui.bench.loopback_host import LoopbackHost


def test_shards_of_rows_that_are_only_here(
    manyhands: Callable[..., subprocess.CompletedProcess[str]],
    host: LoopbackHost,
    tiny: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """The task's sources are not sent, and need not be there, nor even here."""
    rows = "\n".join(f"{i},{i % 7},{i % 2}" for i in range(200))
    source, shards = tmp_path / "rows.csv", tmp_path / "table"
    source.write_text(f"id,a,label\n{rows}\n")
    made = manyhands(
        *("shards", "pack", "task=tabular", f"task.table.files=[{source}]", "task.target=label"),
        *("--out", str(shards), "--processes", "1"),
    )
    assert made.returncode == 0, made.stderr
    words = ["--no-export", *(word for word in tiny if not word.startswith("task"))]

    done = manyhands("train", "--host", "server1", "--upload-shards", str(shards), *words, "run=uploaded")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((host.manyhands_home / "runs" / "uploaded" / "host.json").read_text())
    there = Path(record["parts"][0]["directory"])
    assert not (there / "inputs").exists()
    (place,) = (there.parent.parent / "shards").glob("table-*")

    done = manyhands("eval", "uploaded")
    assert done.returncode == 4, done.stdout
    assert "fetch it with `manyhands hosts fetch uploaded --all`" in done.stderr
    assert manyhands("hosts", "fetch", "uploaded", "--all").returncode == 0
    place.rename(place.with_name("moved"))  # this user could read them there
    done = manyhands("eval", "uploaded")
    assert done.returncode == 4, done.stdout
    assert "say where they are (--shards DIR)" in done.stderr
    done = manyhands("eval", "uploaded", "--shards", str(shards), "--format", "json")
    assert done.returncode == 0, done.stderr
    lines = (host.manyhands_home / "runs" / "uploaded" / "events.jsonl").read_text().splitlines()
    last = [event for event in map(json.loads, lines) if event["kind"] == "evaluation"][-1]
    assert json.loads(done.stdout)[0]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    done = manyhands("train", "--resume", "uploaded", "--shards", str(shards))
    assert done.returncode == 0, done.stdout + done.stderr
    place.with_name("moved").rename(place)

    source.unlink()
    done = manyhands("train", "--host", "server1", "--shards", str(place), *words, "run=there")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 5/" in done.stdout
