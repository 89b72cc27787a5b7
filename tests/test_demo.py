"""The main job in small: one run of `manyhands demo`, and a short one with options, looked at from several sides."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.slow
MANYHANDS = Path(sys.executable).with_name("manyhands")
SECONDS = 300.0
MEMORY_BYTES = 6 * 2**30


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """One demo, as a person starts it: its summary, what it printed, and where its files are."""
    home = tmp_path_factory.mktemp("demo-home")
    environment = {**os.environ, "MANYHANDS_HOME": str(home)}
    done = subprocess.run(
        [str(MANYHANDS), "demo"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    path = Path(done.stdout.strip().splitlines()[-1])
    return json.loads(path.read_text()), done.stdout, path.parent


def test_the_model_is_better(demo: tuple[dict[str, Any], str, Path]) -> None:
    summary, _, _ = demo
    assert summary["validation_loss_after"] <= 0.6 * summary["validation_loss_before"]
    assert summary["clients"] == 3


def test_a_client_was_killed_and_came_back(demo: tuple[dict[str, Any], str, Path]) -> None:
    summary, printed, _ = demo
    assert summary["killed_pid"] != summary["rejoined_pid"]
    assert 0 < summary["rejoined_round"] < summary["rounds"]
    assert "SIGKILL" in printed
    assert summary["killed_client"][:8] in printed or "hand-2" in printed


def test_the_ledger_knows(demo: tuple[dict[str, Any], str, Path]) -> None:
    summary, printed, _ = demo
    command = next(line for line in printed.splitlines() if line.startswith("Ledger"))
    arguments = command.split("manyhands", 1)[1].split()
    done = subprocess.run(
        [str(MANYHANDS), *arguments, "--format", "json"], capture_output=True, text=True, check=True
    )
    told = json.dumps(json.loads(done.stdout))
    assert "rejoined" in told
    assert summary["killed_client"] in told


def test_transformers_loads_the_checkpoint(demo: tuple[dict[str, Any], str, Path]) -> None:
    summary, _, _ = demo
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "ids = t('def ', return_tensors='pt').input_ids; print(m(ids).logits.shape[-1] == len(t))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, summary["checkpoint"]],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().endswith("True")


def test_the_run_is_sampled_by_its_name(
    demo: tuple[dict[str, Any], str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    summary, _, directory = demo
    monkeypatch.setenv("MANYHANDS_HOME", str(directory.parents[1]))
    command = [
        str(Path(sys.executable).with_name("manyhands")),
        "sample",
        summary["run_id"],
        "--prompt",
        "def ",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def ")


def test_there_is_a_picture_and_a_sample(demo: tuple[dict[str, Any], str, Path]) -> None:
    summary, _, directory = demo
    assert Path(summary["plot"]).read_bytes().startswith(b"\x89PNG")
    assert Path(summary["plot"]).is_relative_to(directory)
    assert len(summary["sample"]) > 100


def test_it_is_quick_and_small(demo: tuple[dict[str, Any], str, Path]) -> None:
    """The promise: five minutes on two cores, six gibibytes. On a machine that others use it may take longer."""
    summary, _, _ = demo
    assert summary["peak_rss_bytes"] < MEMORY_BYTES
    if psutil.cpu_count() == 2 and os.getloadavg()[2] < 3:
        assert summary["seconds"] < SECONDS


def test_nothing_is_left_running(demo: tuple[dict[str, Any], str, Path]) -> None:
    _, _, directory = demo
    assert running_in(directory) == []


def running_in(directory: Path) -> list[str]:
    """Programs and workers of a demo: its directory is in their command line or in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = " ".join([*process.cmdline(), process.environ().get("MANYHANDS_HOME", "")])
            if str(directory) in words and process.pid != os.getpid():
                found.append(words)
    return found


# ------------------------------------------------------------------------------ a short one, with options
TINY = [
    *("task.tokenizer.kind=byte", "task.model={n_layer: 1, n_head: 2, n_embd: 16}", "task.block_size=16"),
    *("local.steps=400", "local.batch_size=2", "evaluation.max_batches=2"),
    *("rounds.suspected_after_s=1", "rounds.lost_after_s=3"),
]


class Short:
    """`manyhands demo` with --clients, --rounds, --text, --directory, --keep and a tiny model, while it runs."""

    def __init__(self, place: Path) -> None:
        self.directory = place / "demo"
        self.text = place / "text"
        self.text.mkdir()
        for name in ("fox", "dog"):
            (self.text / f"{name}.txt").write_text(f"the quick {name} jumps over the lazy one\n" * 400)
        self.log = place / "printed"
        options = ["--clients", "2", "--rounds", "6", "--text", str(self.text)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(MANYHANDS), "demo", *options, "--directory", str(self.directory), "--keep", *TINY],
                env={**os.environ, "MANYHANDS_HOME": str(place / "home")},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str) -> None:
        end = time.monotonic() + SECONDS
        while words not in self.printed:
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < end, f"waited for {words!r}:\n{self.printed}"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def start_short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Short]]:
    started: list[Short] = []

    def start() -> Short:
        started.append(Short(tmp_path_factory.mktemp("short-demo")))
        return started[-1]

    yield start
    for short in started:
        short.process.kill()
        short.process.wait()


def test_a_short_demo_with_options_keeps_its_dashboard_until_it_is_told(
    start_short: Callable[[], Short],
) -> None:
    short = start_short()
    short.wait_for("summary.json")
    summary = json.loads((short.directory / "summary.json").read_text())
    assert (summary["clients"], summary["rounds"]) == (2, 6)
    assert 0 < summary["rejoined_round"] < 6
    assert str(short.text) in (short.directory / "plan.yaml").read_text()
    with urllib.request.urlopen(f"http://{summary['server_addr']}/runs/{summary['run_id']}") as page:
        assert b"<title>" in page.read()
    short.process.send_signal(signal.SIGINT)
    assert short.process.wait(60) == 0
    assert short.printed.endswith("ending server and clients\n")
    assert running_in(short.directory) == []


@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_ends_all_of_it(
    start_short: Callable[[], Short], number: signal.Signals, times: int
) -> None:
    """In order at the first one, at once at the second."""
    short = start_short()
    short.wait_for("hand-2 joined")
    assert len(running_in(short.directory)) >= 4  # server, clients, workers
    short.process.send_signal(number)
    short.wait_for("interrupted: ending server and clients; once more to leave at once")
    if times == 2:
        short.process.send_signal(number)
    assert short.process.wait(60) == 130
    assert short.printed.splitlines()[-1].startswith("interrupted")
    end = time.monotonic() + 20  # workers of killed programs notice by themselves
    while running_in(short.directory) and time.monotonic() < end:
        time.sleep(0.1)
    assert running_in(short.directory) == []
