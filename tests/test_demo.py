"""The main job in small: one run of `manyhands demo`, looked at from several sides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
    left = [
        p.pid for p in psutil.process_iter(["cmdline"]) if str(directory) in " ".join(p.info["cmdline"] or [])
    ]
    assert left == []
