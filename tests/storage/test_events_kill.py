"""kill -9 at every statement of an append: the log is a prefix, and nothing acknowledged is missing.

One subprocess imports once and forks a child per kill point. A child appends batches, writes the last
sequence number to a pipe after each acknowledged append, and kills itself before or after the n-th statement
that reaches the database (BEGIN and COMMIT included), so every point is met, not a random one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands.storage.database import open_database
from manyhands.storage.events import RunLog

APPENDER = r"""
import json, os, shutil, signal, sys
import sqlalchemy as sa
from manyhands.coordination.state import DataLedger, RunState
from manyhands.coordination.effects import Effect, PhaseChanged
from manyhands.coordination.events import Joined
from manyhands.plan.schema import Plan
from manyhands.storage.database import open_database
from manyhands.storage.events import RunLog
from manyhands.coordination.machine import NumberedEffect
from manyhands.coordination.records import Record
from manyhands.storage.runs import create_run

def batch(after):
    numbers = (after + 1, after + 2)
    joined = Joined(client="c", boot="b")
    effect = Effect(to="everyone", body=PhaseChanged(phase="p", reason="r"))
    events = [Record(sequence=n, now_ms=n, seed=n, event=joined) for n in numbers]
    effects = [NumberedEffect(sequence=n, n=k, effect=effect) for n in numbers for k in (0, 1)]
    data = DataLedger(total=1)
    state = RunState(run_id="run-1", plan=Plan(), phase="training", sequence=after + 2, data=data, snapshots=())
    return events, effects, state

def child(path, point, acknowledge):
    database = open_database(path)
    log = RunLog(database, "run-1")
    epoch = log.acquire("host")
    count = 0
    def step(*_):
        nonlocal count
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)
    for moment in ("before_cursor_execute", "after_cursor_execute", "commit"):
        sa.event.listen(database.engine, moment, step)
        sa.event.listen(database._writing_engine, moment, step)
    for last in range(0, 6, 2):
        log.append(epoch, last, *batch(last), phase="training")
        os.write(acknowledge, f"{last + 2} ".encode())
    os.write(acknowledge, b"done ")
    os._exit(0)

fresh = open_database(f"{sys.argv[1]}/fresh.db")
create_run(fresh, "run-1", b"{}", "s")
fresh.close()  # nothing of SQLite is open when the children are forked
results = {}
for point in range(1, 1000):
    path = f"{sys.argv[1]}/{point}.db"
    shutil.copy(f"{sys.argv[1]}/fresh.db", path)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(path, point, write)
    os.close(write)
    said = b""
    while part := os.read(read, 4096):
        said += part
    os.close(read)
    os.waitpid(pid, 0)
    results[path] = said.decode().split()
    if "done" in results[path]:
        break
print(json.dumps(results))
"""


@pytest.mark.chaos
def test_killed_at_every_statement(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", APPENDER, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    results: dict[str, list[str]] = json.loads(ran.stdout)
    ends = {}
    for path, said in results.items():
        acknowledged = max([int(word) for word in said if word != "done"], default=0)
        database = open_database(path)
        log = RunLog(database, "run-1")
        records = [record.sequence for record in log.all_records()]
        effects = [record.id for record in log.effects_after("x", (0, -1))]
        state = log.load().state
        database.close()
        assert records == list(range(1, len(records) + 1))
        assert acknowledged <= len(records) <= acknowledged + 2  # what was under way may or may not be there
        assert len(records) % 2 == 0  # a group commit is whole
        assert effects == [(n, k) for n in records for k in (0, 1)]
        assert (state.sequence if state else 0) == len(records)
        ends[len(records), acknowledged] = path
    assert len(results) > 40
    assert set(ends) >= {(0, 0), (2, 2), (4, 4), (6, 6)}


@pytest.mark.chaos
def test_an_owner_that_slept_through_a_takeover_cannot_append(
    log: RunLog, batch: Callable[..., tuple[list[object], list[object]]]
) -> None:
    """The old owner is another process, stopped where it has read everything and is about to append."""
    script = r"""
import sys
from manyhands.coordination.events import ClockPassed
from manyhands.errors import Fenced
from manyhands.storage.database import open_database
from manyhands.storage.events import RunLog
from manyhands.coordination.records import Record
log = RunLog(open_database(sys.argv[1]), "run-1")
epoch = log.acquire("old:1")
print("owner", flush=True)
sys.stdin.readline()
try:
    log.append(epoch, len([*log.all_records()]), [Record(sequence=len([*log.all_records()]) + 1, now_ms=1, seed=1,
                                                        event=ClockPassed())], [])
except Fenced as error:
    print(error)
    sys.exit(error.exit_code)
"""
    command = [sys.executable, "-c", script, str(log._database.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as old:
        assert old.stdout is not None
        assert old.stdout.readline() == "owner\n"
        epoch = log.acquire("new:2")
        log.append(epoch, 0, *batch(0, 2))
        out, _ = old.communicate("go\n", timeout=60)
    assert old.returncode == 9
    assert "it is now at new:2" in out
    assert len([*log.all_records()]) == 2
