"""A house of real programs: the installed command, each server and client in a process of its own with a home of its
own. Every wait is bounded and asks the server's own account of the run, or a client's events; at the end all of
it is killed, nobody's worker may have outlived it, and nobody may have printed a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

COMMAND = str(Path(sys.executable).with_name("manyhands"))
LONG_S = 90.0
"""For anything that has to happen, however busy the machine is."""

DUMMY: dict[str, Any] = {
    "name": "star",
    "run_id": "run",
    "task": {"name": "dummy", "parameters": 250_000, "tensors": 4, "samples": 100_000},
    "local": {"steps": 4, "batch_size": 8},
    "membership": {"min_clients": 2},
    "evaluation": {"every_snapshots": 0},
    "rounds": {"total": 3, "snapshot_every": 2, "keep_updates": 1, "min_work_share": 1.0, "warmup_s": 30},
}
TINY_GPT: dict[str, Any] = {
    "name": "gpt",
    "run_id": "run",
    "task": {
        "name": "language_model",
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 32},
        "block_size": 32,
        "tokenizer": {"kind": "byte"},
        "text": {"max_bytes": 200_000},
    },
    "local": {"steps": 4, "batch_size": 4},
    "evaluation": {"every_snapshots": 0, "max_batches": 2},
    "rounds": {"total": 5, "snapshot_every": 2, "keep_updates": 1, "min_work_share": 1.0, "warmup_s": 60},
}


def with_changes(plan: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`plan` with dotted keys replaced."""
    result: dict[str, Any] = json.loads(json.dumps(plan))
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        place = result
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return result


def until(ready: Callable[[], Any], what: str, within_s: float = LONG_S) -> Any:
    """Ask again and again until the answer is true; it is returned. Fails the test when that takes too long."""
    end = time.monotonic() + within_s
    while True:
        if answer := ready():
            return answer
        if time.monotonic() > end:
            pytest.fail(f"waited {within_s:.0f} s for {what}")
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(eq=False)
class Program:
    """A running command; its output goes to a file, line by line."""

    process: subprocess.Popen[bytes]
    log: Path
    since: int = 0  # where in the log this process began
    children: dict[int, psutil.Process] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return self.log.read_bytes()[self.since :].decode(errors="replace")

    def look_at_children(self) -> list[psutil.Process]:
        """Its living workers; also remembered, for the end."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                self.children.setdefault(child.pid, child)
        return [child for child in self.children.values() if is_running(child)]

    def worker(self, kind: str) -> psutil.Process | None:
        """The living worker whose module has this in its name: client, dummy, aggregator, evaluator."""
        for child in self.look_at_children():
            with contextlib.suppress(psutil.Error):
                if f"workers.{kind}_worker" in " ".join(child.cmdline()):
                    return child
        return None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self, within_s: float = LONG_S) -> int:
        """Wait for its end; the exit code."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {within_s:.0f} s:\n{self.text()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL the program alone; its workers have to notice by themselves."""
        self.look_at_children()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


def is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


class Client(Program):
    """A client with --logs json."""

    key: str

    def events(self) -> list[dict[str, Any]]:
        """What it has said of itself so far, without what is not an event (standard error)."""
        found = []
        for line in self.text().splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    found.append(event)
        return found

    def said(self, kind: str, **facts: Any) -> list[dict[str, Any]]:
        return [
            e for e in self.events() if e["kind"] == kind and all(e.get(k) == v for k, v in facts.items())
        ]


class House:
    """One server on one port, over as many lives as a test wants, and clients."""

    program = Program
    client_program = Client

    def __init__(self, place: Path) -> None:
        self.place = place
        self.port = free_port()
        self.programs: list[Program] = []
        self.plan_file = place / "plan.yaml"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def server_home(self) -> Path:
        return self.place / "server-home"

    def plan(self, base: dict[str, Any], changes: dict[str, Any] | None = None) -> Path:
        self.plan_file.write_text(yaml.safe_dump(with_changes(base, changes or {})))
        return self.plan_file

    # ------------------------------------------------------------------ programs
    def command(
        self, *arguments: str, home: str = "server-home", timeout: float = LONG_S
    ) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself."""
        return subprocess.run(
            [COMMAND, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment(home),
            check=False,
        )

    def environment(self, home: str) -> dict[str, str]:
        return {**os.environ, "MANYHANDS_HOME": str(self.place / home), "COLUMNS": "200"}

    def start(self, kind: type[Program], log: str, home: str, *arguments: str) -> Any:
        path = self.place / f"{log}.log"
        path.touch()
        since = path.stat().st_size
        with path.open("ab") as output:
            process = subprocess.Popen(
                arguments,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=self.environment(home),
                start_new_session=True,
            )
        program = kind(process, path, since)
        self.programs.append(program)
        return program

    def server(self, *more: str, wait: bool = True) -> Program:
        """Start the server with the plan; on the same port each time."""
        arguments = ("server", "run", "--plan", str(self.plan_file), "--port", str(self.port), *more)
        server: Program = self.start(Program, "server", "server-home", COMMAND, *arguments)
        if wait:
            until(lambda: self.answers() or server.process.poll() is not None, "the server to answer")
            assert server.process.poll() is None, server.text()
        return server

    def key(self, name: str) -> Path:
        """A key file, made by the command at the first request."""
        path = self.place / f"{name}.key"
        if not path.exists():
            done = self.command("client", "new-identity", "--identity-secret-key-path", str(path))
            assert done.returncode == 0, done.stderr
            (self.place / f"{name}.public").write_text(done.stdout.strip())
        return path

    def public(self, name: str) -> str:
        self.key(name)
        return (self.place / f"{name}.public").read_text()

    def client(self, name: str, *more: str, home: str = "", run_id: str = "run", key: str = "") -> Client:
        """Start a client; the same name is the same key and the same directory."""
        path = self.key(key or name)
        arguments = [
            *("client", "train", "--run-id", run_id, "--server-addr", self.address),
            *("--identity-secret-key-path", str(path), "--logs", "json", "--threads", "1", "--label", name),
        ]
        client: Client = self.start(Client, name, home or f"{name}-home", COMMAND, *arguments, *more)
        client.key = self.public(key or name)
        return client

    # ------------------------------------------------------------------ what the server says
    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=10) as answer:
            return json.load(answer)

    def answers(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            self.get("/api/runs")
            return True
        return False

    def view(self) -> dict[str, Any]:
        """The run's account; empty while the server is away."""
        with contextlib.suppress(OSError, ValueError):
            answer: dict[str, Any] = self.get("/api/runs/run")
            return answer
        return {}

    def ledger(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.get("/api/runs/run/ledger")
        return rows

    def closed(self) -> int:
        return int(self.view().get("closed_rounds", -1))

    def until_closed(self, rounds: int, within_s: float = LONG_S) -> None:
        until(lambda: self.closed() >= rounds, f"{rounds} closed rounds", within_s)

    def until_phase(self, phase: str, within_s: float = LONG_S) -> dict[str, Any]:
        view: dict[str, Any] = until(
            lambda: (v := self.view()).get("phase") == phase and v, f"phase {phase}", within_s
        )
        return view

    def member(self, client: Client) -> dict[str, Any]:
        """The server's account of one client; empty while there is none."""
        return next((c for c in self.view().get("clients", ()) if c["key"] == client.key), {})

    def incidents(self, client: Client) -> list[str]:
        """Everything that the ledger says has happened to a client, in order."""
        return [i["what"] for i in self.view()["incidents"] if i["client"] == client.key]

    def counted(self, client: Client, since_round: int = 0) -> list[int]:
        """The rounds from `since_round` on in which something of this client was merged."""
        return [
            row["number"]
            for row in self.ledger()
            if row["number"] >= since_round
            and any(c["client"] == client.key for c in row["closing"]["counted"])
        ]

    # ------------------------------------------------------------------ the end
    def close(self) -> None:
        for program in self.programs:
            for child in program.look_at_children():  # who was stopped would not notice the end
                with contextlib.suppress(psutil.Error):
                    child.send_signal(signal.SIGCONT)
        for program in self.programs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.process.wait()

    def leftovers(self) -> list[psutil.Process]:
        return [c for program in self.programs for c in program.children.values() if is_running(c)]

    def kill_leftovers(self) -> None:
        for process in self.leftovers():
            with contextlib.suppress(psutil.Error):
                process.kill()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    try:
        yield made
        made.close()
        end = time.monotonic() + 15
        while left := made.leftovers():
            assert time.monotonic() < end, f"workers outlived their programs: {[p.cmdline() for p in left]}"
            time.sleep(0.05)
        for log in tmp_path.glob("*.log"):
            text = log.read_text(errors="replace")
            assert "Traceback" not in text, f"{log.name}:\n{text[-4000:]}"
            assert "never retrieved" not in text, f"{log.name}:\n{text[-4000:]}"
    finally:
        made.close()
        made.kill_leftovers()


@pytest.fixture
def dummy_plan() -> dict[str, Any]:
    return DUMMY


@pytest.fixture
def tiny_gpt() -> dict[str, Any]:
    return TINY_GPT


@pytest.fixture(name="until")
def _until() -> Callable[..., Any]:
    return until
