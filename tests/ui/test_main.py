"""The installed command in processes of its own: help, names, errors, exit codes."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands import errors
from manyhands.ui.checkpoints import locate
from manyhands.ui.main import cli, run

Run = Callable[..., subprocess.CompletedProcess[str]]
DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "exit-codes.md"


def test_help_names_every_command(manyhands: Run) -> None:
    done = manyhands("--help")
    assert done.returncode == 0
    for name in ("demo", "train", "server", "client", "join", "ledger", "runs", "config", "bench"):
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE), name
    assert manyhands().stdout == done.stdout == manyhands("help").stdout


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    """The whole process in under 0.3 s (the median: other work runs on this machine), without heavy modules."""
    command = [str(Path(sys.executable).with_name("manyhands")), "--help"]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.3
    code = (
        "import sys, manyhands.ui.main as m; m.run(['--help']); print(','.join(sys.modules), file=sys.stderr)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = set(loaded.stderr.strip().split(","))
    assert not modules & {
        "pydantic",
        "rich",
        "fastapi",
        "torch",
        "numpy",
        "yaml",
        "hydra",
        "aiohttp",
        "sqlalchemy",
    }


def test_every_command_loads_and_has_help() -> None:
    """What a group says of a command is where the command is; each has a text of its own."""
    import click

    def walk(group: click.Group) -> int:
        context = click.Context(group)
        count = 0
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            assert command.name == name
            assert command.get_help(click.Context(command))
            assert "--debug" in command.get_help(click.Context(command))
            count += 1 + (walk(command) if isinstance(command, click.Group) else 0)
        return count

    assert walk(cli) > 20


@pytest.mark.parametrize(
    "words",
    [
        ["help", "server"],
        ["server", "help"],
        ["server", "--help"],
        ["server"],
    ],
)
def test_help_of_a_group(manyhands: Run, words: list[str]) -> None:
    done = manyhands(*words)
    assert done.returncode == 0
    assert "validate" in done.stdout
    assert done.stdout.startswith("Usage: manyhands server")


@pytest.mark.parametrize("words", [["help", "client", "show-identity"], ["client", "help", "show_identity"]])
def test_help_of_a_command(manyhands: Run, words: list[str]) -> None:
    done = manyhands(*words)
    assert done.returncode == 0
    assert done.stdout == manyhands("client", "show-identity", "--help").stdout


def test_version(manyhands: Run) -> None:
    from manyhands import __version__

    assert manyhands("--version").stdout == f"manyhands {__version__}\n"


def test_underscores_are_dashes(manyhands: Run, tmp_path: Path) -> None:
    made = manyhands("client", "new_identity", "--identity_secret_key_path", "a_b.key")
    assert made.returncode == 0
    assert (tmp_path / "a_b.key").exists()  # only names are treated alike, never values
    shown = manyhands("client", "show-identity", "--identity_secret-key_path=a_b.key")
    assert shown.stdout == made.stdout


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["sever"], "Did you mean 'server'?"),
        (["server", "validat", "--plan", "x"], "Did you mean 'validate'?"),
        (["help", "server", "rum"], "Did you mean 'run'?"),
        (["xyzzy"], "Commands: demo, "),
        (["client", "train", "--run-it", "r"], "--run-id"),
        (["client", "train", "--server-addr", "a:1"], "--run-id"),
        (["help", "train", "now"], "'train' has no commands of its own"),
        (["train", "local.steps"], "'local.steps' is not KEY=VALUE"),
        (["ledger", "r", "--server-addr", "a:1", "--data-dir", "d"], "contradict"),
        (["bench", "cores"], "'core'"),
    ],
)
def test_usage_errors(manyhands: Run, words: list[str], hint: str) -> None:
    done = manyhands(*words)
    assert done.returncode == 2, done.stderr
    assert hint in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_an_error_of_ours_is_words_and_a_code(manyhands: Run) -> None:
    done = manyhands("client", "show-identity", "--identity-secret-key-path", "missing.key")
    assert done.returncode == errors.IdentityError.exit_code
    assert done.stderr.startswith("error: ")
    assert "missing.key" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("extra", "environment"),
    [(["--debug"], {}), ([], {"MANYHANDS_DEBUG": "1"})],
)
def test_debug_shows_the_traceback(manyhands: Run, extra: list[str], environment: dict[str, str]) -> None:
    words = ["client", "show-identity", *extra, "--identity-secret-key-path", "missing.key"]
    done = manyhands(*words, env=environment)
    assert done.returncode == errors.IdentityError.exit_code
    assert "Traceback" in done.stderr
    assert "error: " in done.stderr


def run_in_process(
    body: str, *words: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The real main with one command replaced: the only way to an unexpected error and to Ctrl-C at will."""
    code = f"""
import sys, types, click
from manyhands.ui import main as m
from manyhands.ui.command_line import Command, Entry
module = types.ModuleType("made_up")
@click.command("boom", cls=Command)
def boom():
    {body}
module.boom = boom
sys.modules["made_up"] = module
m.cli._entries["boom"] = Entry("made_up:boom", "made up")
m.main(["boom", *sys.argv[1:]])
"""
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        check=False,
        timeout=30,
    )


def test_an_unexpected_error_says_how_to_see_more() -> None:
    done = run_in_process("raise KeyError('inner')")
    assert done.returncode == 1
    assert "unexpected KeyError: 'inner'" in done.stderr
    assert "--debug" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in run_in_process("raise KeyError('inner')", "--debug").stderr


def test_interrupt_is_130() -> None:
    done = run_in_process("raise KeyboardInterrupt")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_is_no_error() -> None:
    command = f"{Path(sys.executable).with_name('manyhands')} config show --plan demo | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "name: demo\n"
    assert done.stderr == ""


def test_exit_codes_are_documented() -> None:
    """docs/reference/exit-codes.md has exactly the codes and classes of errors.py, and click's 0 and 2."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name: int(code) for code, names in rows for name in re.findall(r"`(\w+)`", names)}
    classes = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.ManyhandsError)
    }
    assert documented == classes
    assert {int(code) for code, _ in rows} == {0, 2, *classes.values()}


def test_main_never_returns_silently(manyhands: Run) -> None:
    done = manyhands("runs", "ls", "--format", "json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == []


def test_the_newest_checkpoint_is_the_one_with_the_highest_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MANYHANDS_HOME", str(tmp_path))
    kept = tmp_path / "runs" / "long" / "checkpoints"
    for name in ("step-00000011", "step-100000000", "aside", ".step-200000000.partial-7", "step-9"):
        (kept / name).mkdir(parents=True)
    assert run(["runs", "ls", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["latest_checkpoint"] == "step-100000000"
    assert locate("long") == kept / "step-100000000"
