"""The `manyhands` command: finds the command, runs it, and turns every error into words and an exit code.

Imports nothing but click and the error tree, so that `manyhands --help` answers at once; a command's module is
imported when it is run. Exit codes: docs/reference/exit-codes.md.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import click

from manyhands import __version__
from manyhands.errors import Interrupted, ManyhandsError, NotFinite, PlanError
from manyhands.ui.command_line import Entry, LazyGroup

DEBUG_VARIABLE = "MANYHANDS_DEBUG"

_TELLING_S = 1.0
"""So long before a process ends that says nothing: the others are ended with it, also the one that tells why."""
_HERE = "manyhands.ui.commands"
_COMMANDS = {
    "demo": Entry(
        f"{_HERE}.demo:demo", "A server, three clients and a dashboard on this machine train a small model."
    ),
    "train": Entry(f"{_HERE}.train:train", "Train a plan's task on this machine, or on others (--host)."),
    "shards": Entry(
        f"{_HERE}.shards:shards",
        "Data made ahead as Parquet files: make, import, show, verify and merge them.",
    ),
    "gen-tpg": Entry(
        f"{_HERE}.shards_making:gen_tpg", "Chess endgames as shards: the same as `shards gen-endgames`."
    ),
    "init": Entry(f"{_HERE}.init:init", "Write a plan and a task file for data or a model of your own."),
    "eval": Entry(
        f"{_HERE}.evaluate:evaluate", "Evaluate a checkpoint on its own sets, or on those of lm-eval."
    ),
    "sample": Entry(f"{_HERE}.sample:sample", "Text from a trained language model."),
    "export": Entry(f"{_HERE}.export:export", "A checkpoint as ONNX or safetensors, for other programs."),
    "gpus": Entry(f"{_HERE}.gpus:gpus", "Which process of whom uses which NVIDIA GPU of this machine."),
    "server": Entry(f"{_HERE}.server:server", "Run, check and steer a server."),
    "client": Entry(f"{_HERE}.client:client", "Take part in a run; make and show identities."),
    "join": Entry(f"{_HERE}.client_train:join", "Take part in a run: the same as `client train`."),
    "ledger": Entry(f"{_HERE}.ledger:ledger", "What happened in each round of a run, to whom, and why."),
    "hosts": Entry(f"{_HERE}.hosts:hosts", "Other machines to train on, over SSH."),
    "runs": Entry(f"{_HERE}.runs:runs", "The runs on this machine or on a server."),
    "config": Entry(
        f"{_HERE}.config:config",
        "Show a configuration after presets and overrides; copy the configs to edit them.",
    ),
    "bench": Entry(f"{_HERE}.bench:bench", "Measure manyhands on this machine beside its targets."),
}


def _print_version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"manyhands {__version__}")
        context.exit()


cli = LazyGroup(
    "manyhands",
    _COMMANDS,
    help="Train one model with many machines: your GPUs, your SSH hosts, institutions that cannot share their "
    "data, or strangers on the internet.",
    epilog="Start with: manyhands demo",
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_print_version,
            help="Show the version.",
        )
    ],
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line (default: this process's) and exit with its code. Never returns.

    SIGTERM is the same as SIGINT, unless the command says otherwise.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; what went wrong is on standard error."""
    meta: dict[str, object] = {}
    try:
        with cli.make_context("manyhands", arguments) as context:
            meta = context.meta
            cli.invoke(context)
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        return _usage(error)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return Interrupted.exit_code
    except BrokenPipeError:
        _quiet_standard_output()
        return 1
    except Interrupted as end:
        if not _is_told_by_another_rank():
            _tell(str(end))
        return end.exit_code
    except ManyhandsError as error:
        alike = isinstance(error, PlanError | NotFinite) and _is_told_by_another_rank()
        if not _traceback_if_asked(meta) and alike:
            with suppress(KeyboardInterrupt):
                time.sleep(_TELLING_S)
            return error.exit_code
        _tell(f"error: {error}")
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the boundary of the process: every fault becomes words and a code
        again = "" if _traceback_if_asked(meta) else "\nRun it again with --debug to see where it happened."
        _tell(f"error: unexpected {type(error).__name__}: {error}{again}")
        return ManyhandsError.exit_code


def _tell(text: str) -> None:
    """On standard error; what others have written into it cannot steer the terminal."""
    from manyhands.ui.terminal import printable_lines

    click.echo(printable_lines(text), err=True)


def _is_told_by_another_rank() -> bool:
    """Of processes that one command has started here: what is the same for all of them is said once."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def _usage(error: click.ClickException) -> int:
    """Words for a command line that does not fit; exit code 2."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is not None:
        click.echo(context.get_usage(), err=True)
        click.echo(f"Try '{context.command_path} --help'.\n", err=True)
    click.echo(f"error: {error.format_message()}", err=True)
    return error.exit_code


def _traceback_if_asked(meta: dict[str, object]) -> bool:
    """Print the traceback of the error being handled where --debug or MANYHANDS_DEBUG asks for it."""
    asked = "manyhands.debug" in meta or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    if asked:
        import traceback

        traceback.print_exc()
        return True
    return False


def _quiet_standard_output() -> None:
    """The reader has gone (`manyhands ledger R | head`): keep Python from complaining when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
