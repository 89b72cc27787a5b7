"""`manyhands client train`, also `manyhands join`: take part in a run until it is finished.

Every option that users of Psyche's client know is here. Those that cannot be honoured yet are refused by name when
they are given; none is accepted and then ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any

import click

from manyhands.ui.command_line import Command, address_option

LOGS = ("tui", "tui-and-console", "console", "json", "none")

_NO_P2P = "updates travel through the server, so there is no peer-to-peer endpoint to bind"
_NO_EVALUATION = "the server evaluates snapshots, on the run's validation data"
_NO_CHECKPOINT = (
    "clients keep no checkpoints of their own; the server writes the run's, and names the latest in "
    "`manyhands server status`"
)

# Option -> why it is refused.
NOT_YET: dict[str, str] = {
    "bind_p2p_port": _NO_P2P,
    "bind_p2p_interface": _NO_P2P,
    "eval_tasks": _NO_EVALUATION,
    "eval_fewshots": _NO_EVALUATION,
    "eval_seed": _NO_EVALUATION,
    "eval_test_max_docs": _NO_EVALUATION,
    "checkpoint_dir": _NO_CHECKPOINT,
    "hub_repo": _NO_CHECKPOINT,
    "keep_steps": _NO_CHECKPOINT,
}

FIGURES = ("optim_stats_steps", "wandb_project", "wandb_run", "wandb_group", "wandb_entity")

_Option = Callable[[Callable[..., Any]], Callable[..., Any]]
_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)


def _who_and_where() -> list[_Option]:
    """Who takes part, and in what."""
    return [
        click.option("--run-id", required=True, metavar="RUN", help="The run to take part in."),
        address_option(required=True, help="Where its server listens."),
        click.option(
            "--identity-secret-key-path",
            metavar="FILE",
            type=_PATH,
            help="Your key file.  [default: a fresh key for this process]",
        ),
        click.option(
            "--server-key", metavar="KEY", help="The server's public key, if you have it from elsewhere."
        ),
        click.option(
            "--label", metavar="NAME", default="", help="Your name in tables.  [default: this machine's]"
        ),
    ]


def _devices() -> list[_Option]:
    """What computes, and how much at once."""
    return [
        click.option(
            "--device",
            metavar="DEVICE",
            default="auto",
            show_default=True,
            help="auto, cpu, cuda, cuda:1, ...",
        ),
        click.option(
            "--threads",
            metavar="N",
            type=_COUNT,
            help="CPU threads of each process; clients that share a machine should share its cores.  [default: "
            "torch's choice]",
        ),
        click.option(
            "--micro-batch-size",
            metavar="N",
            type=_COUNT,
            help="Samples per forward pass of a replica.  [default: its share of a step]",
        ),
    ]


def _conduct() -> list[_Option]:
    """How it behaves, and what it tells."""
    return [
        click.option("--patient", is_flag=True, help="Wait for a server that does not answer yet."),
        click.option(
            "--allow-task",
            "allowed",
            multiple=True,
            metavar="MODULE:NAME",
            help="Let the run's plan name this code of yours.",
        ),
        click.option(
            "--logs",
            type=click.Choice(LOGS),
            help="What to show.  [default: tui on a terminal, else console]",
        ),
        click.option(
            "--tui",
            type=bool,
            is_flag=False,
            flag_value=True,
            default=None,
            metavar="[true|false]",
            help="--tui is --logs tui, --tui false is --logs console.",
        ),
        click.option(
            "--write-log", metavar="FILE", type=_PATH, help="Append every event to this file, as JSON lines."
        ),
        click.option(
            "--write-gradients-dir",
            metavar="DIR",
            type=_PATH,
            help="Keep the updates of this client in this directory.",
        ),
        click.option(
            "--grad-accum-in-fp32",
            is_flag=True,
            help="Accepted: gradients are accumulated in fp32 in any case.",
        ),
        click.option(
            "--dummy-training-delay-secs",
            metavar="SECONDS",
            type=click.FloatRange(min=0),
            help="Sleep for so long in each round (task dummy).",
        ),
    ]


def _figures() -> list[_Option]:
    """Where figures of its training go beside --logs and --write-log."""
    return [
        click.option(
            "--optim-stats-steps",
            metavar="N",
            type=_COUNT,
            help="An event with the norms of every tensor, its gradient and its optimizer state so often.",
        ),
        click.option(
            "--wandb-project",
            metavar="NAME",
            help="Report to this project of Weights & Biases (extra: wandb).",
        ),
        click.option(
            "--wandb-run", metavar="NAME", help="The run's name there.  [default: your key's first digits]"
        ),
        click.option(
            "--wandb-group", metavar="NAME", help="Its group there, such as the run that you take part in."
        ),
        click.option("--wandb-entity", metavar="NAME", help="The user or team that owns the project."),
    ]


def _parallelism() -> list[_Option]:
    """How several processes share the work."""
    return [
        click.option(
            "--data-parallelism",
            metavar="N",
            type=_COUNT,
            default=1,
            show_default=True,
            help="Replicas in this client; they share each step's samples.",
        ),
        click.option(
            "--tensor-parallelism",
            metavar="N",
            type=_COUNT,
            default=1,
            show_default=True,
            help="Devices that share each replica.",
        ),
        click.option(
            "--rank-timeout",
            metavar="SECONDS",
            type=click.FloatRange(min=1),
            default=120,
            show_default=True,
            help="How long these processes wait for one that stands still.",
        ),
    ]


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All options, in the order in which the help shows them."""
    later: list[_Option] = [
        click.option("--" + name.replace("_", "-"), name, metavar="...", hidden=True) for name in NOT_YET
    ]
    for option in reversed(
        [*_who_and_where(), *_devices(), *_conduct(), *_figures(), *_parallelism(), *later]
    ):
        function = option(function)
    return function


def _refuse_what_is_missing(context: click.Context, given: dict[str, Any]) -> None:
    for name, reason in NOT_YET.items():
        if given[name] is not None:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} {given[name]} is not available yet: {reason}.", context)


def _shown(logs: str | None, tui: bool | None) -> str | None:
    """What --logs and --tui ask for together; None: nothing."""
    old = None if tui is None else ("tui" if tui else "console")
    if logs is not None and old is not None and logs != old:
        raise click.UsageError(f"--logs {logs} and --tui {str(tui).lower()} contradict each other: give one")
    return logs or old


def _take_part(context: click.Context, **given: Any) -> None:
    _refuse_what_is_missing(context, given)
    shown = _shown(given["logs"], given["tui"])

    from manyhands.engine.settings import Logging
    from manyhands.identity import keys
    from manyhands.node.client import ClientOptions, join
    from manyhands.ui.live import ClientScreen, choose_logs
    from manyhands.ui.logs import EventFile, log_to_standard_error

    logging = Logging.parse(
        {name: given[name] for name in FIGURES if given[name] is not None}, where="client train"
    )
    key_path = given["identity_secret_key_path"]
    identity = keys.ephemeral() if key_path is None else keys.load(key_path)
    logs = choose_logs(shown)
    if logs == "console":
        log_to_standard_error()
    with EventFile(given["write_log"]) as file, ClientScreen(logs, identity.public) as screen:

        def on_event(event: Any) -> None:
            file.write(event)
            screen.show(event)

        join(
            ClientOptions(
                server_addr=given["server_addr"],
                run_id=given["run_id"],
                identity=identity,
                device=given["device"],
                threads=given["threads"],
                label=given["label"],
                server_key=given["server_key"],
                micro_batch_size=given["micro_batch_size"],
                data_parallelism=given["data_parallelism"],
                tensor_parallelism=given["tensor_parallelism"],
                rank_timeout_s=given["rank_timeout"],
                write_gradients_dir=given["write_gradients_dir"],
                allowed_tasks=given["allowed"],
                patient=given["patient"],
                on_event=on_event,
                logging=logging,
                dummy_delay_s=given["dummy_training_delay_secs"],
            )
        )


def _not_yet() -> str:
    """Their names in lines that are not broken at hyphens."""
    names = ("--" + name.replace("_", "-") for name in NOT_YET)
    return fill(" ".join(names), 100, break_on_hyphens=False)


def _command(name: str) -> click.Command:
    @click.pass_context
    def take_part(context: click.Context, /, **given: Any) -> None:
        _take_part(context, **given)

    return click.command(
        name,
        cls=Command,
        help="Take part in a run until it is finished. May be stopped and started again at any time; with the same "
        "key file it goes on as the same client.",
        epilog="Known from elsewhere, not available yet, and refused by name when given:\n\n\b\n"
        + _not_yet(),
    )(_options(take_part))


train = _command("train")
join = _command("join")
