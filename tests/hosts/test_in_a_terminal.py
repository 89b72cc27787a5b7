"""Ctrl-C in front of a training on a host: a real terminal, a person who answers or does not."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from manyhands.hosts.agent import SUPERVISOR, program, reached
from manyhands.hosts.hosts_file import host_named
from manyhands.hosts.on_host.processes import begun
from manyhands.hosts.record import Part, Record
from manyhands.ui.bench.loopback_host import LoopbackHost

TRAINING = """
import json, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
def tell(kind, **fields):
    with open("events.jsonl", "a") as file:
        file.write(json.dumps({"version": 1, "time_ms": time.time_ns() // 1000000, "kind": kind, **fields}) + "\\n")
tell("started", step=0, steps=9999, samples=100, parameters=10, device="cpu", processes=1, threads=1)
for step in range(1, 9999):
    tell("step", step=step, steps=9999, loss=1 / step, learning_rate=0.1, gradient_norm=None, tokens_per_s=1.0,
         unit="rows", mfu=None, memory_bytes=1, left_s=1.0, skipped=0)
    time.sleep(0.1)
"""


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, environment: dict[str, str], *words: str) -> None:
        self.text = ""
        main, other = pty.openpty()
        self._main = main
        self.process = subprocess.Popen(
            [sys.executable, "-m", "manyhands", *words],
            stdin=other, stdout=other, stderr=other, start_new_session=True,
            env={**os.environ, **environment, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(other)

    def sees(self, words: str, within_s: float = 30) -> None:
        end = time.monotonic() + within_s
        start = len(self.text)
        while words not in self.text[max(0, start - 200) :]:
            assert time.monotonic() < end, f"waited for {words!r} in {self.text[-2000:]}"
            if select.select([self._main], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self._main, 65536).decode("utf-8", "replace")
                except OSError:  # the other side is closed
                    assert words in self.text, self.text[-2000:]

    def types(self, keys: bytes) -> None:
        os.write(self._main, keys)

    def ends(self) -> int:
        return self.process.wait(30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def status(host: LoopbackHost, tmp_path: Path) -> Iterator[dict[str, int]]:
    """A training on the host, of which a record is here."""
    import asyncio

    directory = str(host.home / "runs" / tmp_path.name)

    async def start() -> dict[str, int]:
        async with reached(host_named("server1")) as there:
            job = {"command": ["/usr/bin/env", "python3", "-c", TRAINING]}
            answer = await there.ask("start", run=directory, supervisor=program(SUPERVISOR), job=job)
            found: dict[str, int] = answer["status"]
            return found

    found = asyncio.run(start())
    record = Record(run="shown", parts=(Part(host="server1", directory=directory),), samples_per_step=4)
    record.keep_in(host.manyhands_home / "runs" / "shown")
    yield found
    for name in ("pid", "child"):
        if begun(found[name]) is not None:
            os.kill(found[name], signal.SIGKILL)


@pytest.fixture
def terminal(host: LoopbackHost, status: dict[str, int]) -> Iterator[Terminal]:
    assert status
    found = Terminal(host.environment(), "hosts", "attach", "shown")
    yield found
    found.close()


QUESTION = "[g]o on watching? "


def test_asked_and_detached(terminal: Terminal, status: dict[str, int]) -> None:
    terminal.sees("samples/s")
    terminal.types(b"\x03")
    terminal.sees(QUESTION)
    terminal.types(b"d\n")
    terminal.sees("shown goes on at server1; see it again with: manyhands hosts attach shown")
    assert terminal.ends() == 0
    assert begun(status["child"]) is not None


def test_asked_gone_on_and_stopped(terminal: Terminal, host: LoopbackHost) -> None:
    terminal.sees("samples/s")
    terminal.types(b"\x03")
    terminal.sees(QUESTION)
    terminal.types(b"g\n")
    terminal.sees("samples/s")
    terminal.types(b"\x03")
    terminal.sees(QUESTION)
    terminal.types(b"s\n")
    terminal.sees("server1 is asked to save and end")
    terminal.sees("was asked to end, and has ended")
    assert terminal.ends() == 130
    record = json.loads((host.manyhands_home / "runs" / "shown" / "host.json").read_text())
    assert record["parts"][0]["ending"]["exit_code"] == 130


def test_a_second_one_detaches(terminal: Terminal, status: dict[str, int]) -> None:
    terminal.sees("samples/s")
    terminal.types(b"\x03")
    terminal.sees(QUESTION)
    terminal.types(b"\x03")
    assert terminal.ends() == 130
    assert begun(status["child"]) is not None


def test_several_in_one_table(host: LoopbackHost, status: dict[str, int]) -> None:
    assert status
    place = host.manyhands_home / "runs"
    record = json.loads((place / "shown" / "host.json").read_text())
    (place / "too").mkdir()
    (place / "too" / "host.json").write_text(json.dumps(record | {"run": "too"}))
    terminal = Terminal(host.environment(), "hosts", "attach", "shown", "too")
    try:
        terminal.sees("shown training, too training")
        terminal.types(b"\x03")
        terminal.sees(QUESTION)
        terminal.types(b"d\n")
        terminal.sees("too goes on at server1; see it again with: manyhands hosts attach too")
        assert terminal.ends() == 0
    finally:
        terminal.close()


def test_a_sweep_is_stopped(host: LoopbackHost, endless: tuple[str, ...]) -> None:
    words = [word for word in endless if not word.startswith("run=")]
    values = "optimizer.lr=0.001,0.002,0.003"
    terminal = Terminal(host.environment(), "train", "-m", "--host", "server1", "--no-export", *words, values)
    try:
        terminal.sees("training", within_s=90)
        terminal.sees("samples/s")
        terminal.types(b"\x03")
        terminal.sees(QUESTION)
        terminal.types(b"s\n")
        terminal.sees("not begun: optimizer.lr=0.002; optimizer.lr=0.003")
        terminal.sees("was asked to end, and has ended", within_s=60)
        assert terminal.ends() == 130
    finally:
        terminal.close()


def test_one_that_stands_still_is_stopped_too(host: LoopbackHost, status: dict[str, int]) -> None:
    os.kill(status["child"], signal.SIGSTOP)
    words = [sys.executable, "-m", "manyhands", "hosts", "stop", "shown"]
    subprocess.run(words, check=True, env={**os.environ, **host.environment()})
    end = time.monotonic() + 20
    while begun(status["child"]) is not None:
        assert time.monotonic() < end
        time.sleep(0.05)
