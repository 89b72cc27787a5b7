"""The installed command as a process, a server with invented runs, and a headless Chromium that is asked over its
own protocol (so that a test waits for what it wants to see and not for a time)."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

FAKE = Path(__file__).parent / "fake_dashboard.py"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture
def manyhands(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed command; its files are under tmp_path/home."""

    def run(
        *arguments: str, env: dict[str, str] | None = None, timeout: float = 60, cwd: Path = tmp_path
    ) -> subprocess.CompletedProcess[str]:
        script = Path(sys.executable).with_name("manyhands")
        return subprocess.run(
            [str(script), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            env={**os.environ, "MANYHANDS_HOME": str(tmp_path / "home"), "COLUMNS": "110", **(env or {})},
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one training in it: `tiny`, a language model over characters, after eight steps."""
    from manyhands.engine.configuration import configure
    from manyhands.engine.run import train

    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text("many hands make light work. " * 200, encoding="utf-8")
    words = [
        f"task.text.path={home / 'text.txt'}",
        "task.tokenizer.kind=character",
        "task.block_size=16",
        "task.model={n_layer: 1, n_head: 2, n_embd: 16}",
        "local.steps=4",
        "local.batch_size=3",
        "rounds.total=2",
        "rounds.snapshot_every=1",
        "evaluation.max_batches=4",
    ]
    configuration = configure(words)
    directory = home / "runs" / "tiny"
    configuration.keep(directory)
    train(configuration.plan, directory, settings=configuration.settings)
    return home


@pytest.fixture
def trained(trained_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the training `tiny`, in this process's MANYHANDS_HOME."""
    monkeypatch.setenv("MANYHANDS_HOME", str(trained_home))
    return trained_home / "runs" / "tiny"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _fake_server(mode: str, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port = port or free_port()
    process = subprocess.Popen([sys.executable, str(FAKE), str(port), mode])
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(f"{address}/api/runs"), "the fake server to answer")
        yield address, process
    finally:
        process.kill()
        process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def until(ready: Callable[[], Any], what: str, *, within_s: float = 20) -> Any:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {within_s} s for {what}")


@pytest.fixture(scope="session")
def wait_for_answer() -> Callable[[str, float], None]:
    """Wait until something answers at this address, for so many seconds at most."""
    return lambda address, within_s: until(
        lambda: answers(address), f"{address} to answer", within_s=within_s
    )


@pytest.fixture(scope="module")
def still() -> Iterator[str]:
    """Address of a fake server on which nothing changes."""
    with _fake_server("still") as (address, _):
        yield address


@pytest.fixture(scope="session")
def fake_server() -> Callable[..., contextlib.AbstractContextManager[tuple[str, subprocess.Popen[bytes]]]]:
    """Start a fake server of its own: with fake_server(mode[, port]) as (address, process)."""
    return _fake_server


class Page:
    """One tab of a Chromium, over the DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._next = 0
        self.messages: list[str] = []
        self.call("Page.enable")
        self.call("Runtime.enable")
        self.call("Log.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        self._next += 1
        self._socket.send(json.dumps({"id": self._next, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=20))
            if answer.get("id") == self._next:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        if event["method"] == "Runtime.exceptionThrown":
            self.messages.append(str(event["params"]["exceptionDetails"]))
        if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            self.messages.append(event["params"]["entry"]["text"])

    def open(self, address: str, *, width: int = 1280, height: int = 1500, dark: bool = False) -> None:
        self.messages.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression; None where it throws, as while the page is still coming."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return None if "exceptionDetails" in result else result["result"].get("value")

    def wait(self, expression: str, *, within_s: float = 20) -> Any:
        return until(lambda: self.value(expression), expression, within_s=within_s)

    def text(self, selector: str) -> str:
        return str(self.value(f"document.querySelector({selector!r})?.innerText ?? ''"))

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine: install chromium to test the dashboard's pages")
    port = free_port()
    home = tmp_path_factory.mktemp("chromium")
    browser = subprocess.Popen(
        [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={home}",
            f"--remote-debugging-port={port}",
            "about:blank",
        ],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/json/list"), "Chromium to answer")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
            tab = next(t for t in json.load(answer) if t["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None, open_timeout=10) as socket:
            yield Page(socket)
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
