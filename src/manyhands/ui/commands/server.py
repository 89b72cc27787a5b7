"""`manyhands server ...`: run, check and steer a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manyhands.ui.command_line import Command, Entry, LazyGroup, address_option, format_option

if TYPE_CHECKING:
    from manyhands.identity.keys import Identity

_HERE = "manyhands.ui.commands.server"

server = LazyGroup(
    "server",
    {
        "run": Entry(f"{_HERE}:run", "Serve a plan's run until it is stopped."),
        "validate": Entry(f"{_HERE}:validate", "Check a plan and print every setting with its meaning."),
        "status": Entry(f"{_HERE}:status", "Show a server's runs, or one run and its clients."),
        "pause": Entry(f"{_HERE}:pause", "Pause a run after its open round."),
        "resume": Entry(f"{_HERE}:resume", "Let a paused run go on."),
        "kick": Entry(f"{_HERE}:kick", "Put a client out of a run for good."),
        "backup": Entry(f"{_HERE}:backup", "Copy a server's database while it runs."),
    },
    help="Run, check and steer a server. pause, resume and kick need the operator's key, which the first "
    "`server run` makes.",
)

plan_option = click.option(
    "--plan",
    "plan",
    required=True,
    metavar="PLAN",
    help="A plan file (YAML), or the name of a config that comes with manyhands: demo, mesh, dummy.",
)
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
where_option = address_option(required=True, help="Where the server listens.")
run_option = click.option("--run-id", metavar="RUN", help="Which run; may be left out where there is one.")
key_option = click.option(
    "--operator-key",
    type=click.Path(path_type=Path),
    help="The operator's key file.  [default: keys/operator.key in MANYHANDS_HOME]",
)
data_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Where the server keeps database and blobs.  [default: server/ in MANYHANDS_HOME]",
)


@click.command("run", cls=Command)
@plan_option
@overrides_argument
@click.option(
    "--host", metavar="ADDRESS", default="127.0.0.1", show_default=True, help="The address to listen at."
)
@click.option(
    "--port",
    metavar="N",
    type=click.IntRange(0, 65535),
    default=8700,
    show_default=True,
    help="The port to listen at; 0 takes a free one.",
)
@data_option
@click.option("--run-id", metavar="RUN", help="Fixed run id.  [default: the plan's name and six hex digits]")
@click.option(
    "--allow-task",
    "allowed",
    multiple=True,
    metavar="MODULE:NAME",
    help="Let a plan name this code of yours.",
)
def run(
    plan: str,
    overrides: tuple[str, ...],
    host: str,
    port: int,
    data_dir: Path | None,
    run_id: str | None,
    allowed: tuple[str, ...],
) -> None:
    """Serve a plan's run: coordinator, blobs, dashboard. Started again with the same plan it goes on."""
    from manyhands.node.server.program import ServerOptions, serve
    from manyhands.ui.dashboard.router import dashboard_router
    from manyhands.ui.logs import log_to_standard_error
    from manyhands.ui.plans import plan_from

    log_to_standard_error()
    options = ServerOptions(
        host=host,
        port=port,
        data_dir=data_dir,
        run_id=run_id,
        dashboard=lambda _views: dashboard_router(),
        allowed_tasks=allowed,
        on_event=_say,
    )
    serve(plan_from(plan, overrides), options)


def _say(event: dict[str, Any]) -> None:
    """What a server tells the person who started it."""
    click.echo(event.get("text", event["kind"]))
    if event["kind"] == "serving":
        click.echo(f"  dashboard   {event['dashboard']}")
        click.echo(f"  server key  {event['server_key']}")
        where = f"--run-id {event['run_id']} --server-addr {event['address']}"
        click.echo(
            "  key file    manyhands client new-identity --identity-secret-key-path member.key    (once)"
        )
        click.echo(f"  join with   manyhands client train {where} --identity-secret-key-path member.key")


@click.command("validate", cls=Command)
@plan_option
@overrides_argument
@format_option
def validate(plan: str, overrides: tuple[str, ...], output: str) -> None:
    """Check a plan with its overrides, and print every setting with its value, its default and its meaning."""
    from manyhands.plan.explain import describe, render
    from manyhands.tasks.registry import check_task
    from manyhands.ui.plans import plan_from
    from manyhands.ui.terminal import print_json

    resolved = plan_from(plan, overrides)
    check_task(resolved)
    if output == "table":
        click.echo(render(resolved, width=click.get_current_context().max_content_width or 110))
        return
    rows = [
        {
            "path": setting.path,
            "value": _plain(setting.value),
            "default": _plain(setting.default),
            "changed": setting.changed,
            "meaning": setting.doc,
        }
        for setting in describe(resolved)
    ]
    print_json(rows)


def _plain(value: Any) -> Any:
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value)


@click.command("status", cls=Command)
@where_option
@run_option
@format_option
def status(server_addr: str, run_id: str | None, output: str) -> None:
    """Show a server's runs, or with --run-id one run and its clients. Needs no key."""
    from manyhands.node import operator
    from manyhands.node.view import RunView
    from manyhands.ui.run_view import print_run, print_summaries

    found = operator.status(server_addr, run_id)
    if isinstance(found, RunView):
        print_run(found, output)
    else:
        print_summaries(found, output)


@click.command("pause", cls=Command)
@where_option
@run_option
@key_option
@click.option("--reason", metavar="TEXT", default="", help="What clients and dashboard are told.")
def pause(server_addr: str, run_id: str | None, operator_key: Path | None, reason: str) -> None:
    """Pause a run after its open round."""
    from manyhands.node import operator

    who, which = _operator(server_addr, run_id, operator_key)
    click.echo(operator.pause(server_addr, which, who, reason))


@click.command("resume", cls=Command)
@where_option
@run_option
@key_option
def resume(server_addr: str, run_id: str | None, operator_key: Path | None) -> None:
    """Let a paused run go on."""
    from manyhands.node import operator

    who, which = _operator(server_addr, run_id, operator_key)
    click.echo(operator.resume(server_addr, which, who))


@click.command("kick", cls=Command)
@where_option
@run_option
@key_option
@click.option("--client", required=True, metavar="KEY", help="The client's public key, or its first digits.")
@click.option("--reason", metavar="TEXT", default="", help="What the ledger says.")
def kick(server_addr: str, run_id: str | None, operator_key: Path | None, client: str, reason: str) -> None:
    """Put a client out of a run for good; its work under way is given back."""
    from manyhands.node import operator

    who, which = _operator(server_addr, run_id, operator_key)
    click.echo(operator.kick(server_addr, which, who, client, reason))


def _operator(address: str, run_id: str | None, key: Path | None) -> tuple[Identity, str]:
    from manyhands.node import operator

    identity = operator.load_key(key)
    return identity, run_id or operator.only_run(address)


@click.command("backup", cls=Command)
@data_option
@click.option(
    "--to",
    "destination",
    required=True,
    type=click.Path(path_type=Path),
    help="The file to write; must be new.",
)
def backup(data_dir: Path | None, destination: Path) -> None:
    """Copy a server's database while it runs: runs, logs, leases, the index of blobs.

    The blobs themselves are files that never change, in blobs/ beside the database: copy that directory with any
    tool, after the database.
    """
    from manyhands.config import home
    from manyhands.storage.backup import backup as copy
    from manyhands.storage.database import open_database
    from manyhands.ui.terminal import human_bytes

    database = open_database((data_dir or home() / "server") / "manyhands.db", create=False)
    try:
        size = copy(database, destination)
    finally:
        database.close()
    click.echo(f"wrote {destination} ({human_bytes(size)})")
