"""What all commands of manyhands have in common: lazy loading, `-` and `_` alike, `help`, suggestions, --debug.

`manyhands --help` must answer in under 0.3 s, so a group knows the names and one-line helps of its commands
without importing their modules; a module is imported when its command is run or asked for its own help.
Nothing but click may be imported at the top of this file.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click


class Entry(NamedTuple):
    """Where a command lives, `module:attribute`, and its line in the list of commands."""

    target: str
    help: str


def dashed(name: str) -> str:
    return name.replace("_", "-")


_SETTINGS: dict[str, Any] = {
    "token_normalize_func": dashed,
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
}


def _remember_debug(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().meta["manyhands.debug"] = True


def debug_asked() -> bool:
    """Whether --debug is on the command line that is being carried out."""
    context = click.get_current_context(silent=True)
    return context is not None and "manyhands.debug" in context.meta


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_remember_debug,
        help="Show the traceback of an error.",
    )


class Command(click.Command):
    """A command with --debug, whose --help is also `-h`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings["context_settings"] = {**_SETTINGS, **(settings.get("context_settings") or {})}
        super().__init__(*args, **settings)
        self.params.append(_debug_option())


class LazyGroup(click.Group):
    """A group whose commands are imported on demand; without a command it prints its help."""

    def __init__(self, name: str, entries: Mapping[str, Entry], **settings: Any) -> None:
        settings["context_settings"] = {**_SETTINGS, **(settings.get("context_settings") or {})}
        super().__init__(
            name=name, invoke_without_command=True, no_args_is_help=False, callback=_print_help, **settings
        )
        self.params.append(_debug_option())
        self._entries = {
            **entries,
            "help": Entry("", "Show the help of this group or of one of its commands."),
        }

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self._entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        name = dashed(cmd_name)
        if name not in self._entries:
            return None
        if name == "help":
            return _help_command(self)
        module, _, attribute = self._entries[name].target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            unknown(ctx, self, args[0])
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self._entries.items()])


def unknown(context: click.Context, group: click.Group, name: str) -> None:
    """Raise the usage error for a command that `group` does not have, with the nearest one that it has."""
    known = group.list_commands(context)
    near = difflib.get_close_matches(dashed(name), known, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'?" if near else f"Commands: {', '.join(known)}."
    raise click.UsageError(f"there is no command '{name}'. {hint}", context)


@click.pass_context
def _print_help(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _help_command(group: click.Group) -> click.Command:
    """`help [COMMAND ...]`: the same text as `--help` at the place that the names lead to."""

    def show(names: Sequence[str]) -> None:
        here = click.get_current_context()
        assert here.parent is not None  # `help` is always a command of a group
        context: click.Context = here.parent
        command: click.Command = group
        for name in names:
            if not isinstance(command, click.Group):
                raise click.UsageError(
                    f"'{command.name}' has no commands of its own, hence no '{name}'.", context
                )
            found = command.get_command(context, name)
            if found is None:
                unknown(context, command, name)
            assert found is not None
            command = found
            context = click.Context(found, info_name=found.name, parent=context, **_SETTINGS)
        click.echo(command.get_help(context))

    return Command(
        "help",
        callback=show,
        params=[click.Argument(["names"], nargs=-1, metavar="[COMMAND]...")],
        help="Show the help of this group or of one of its commands.",
    )


def address_option(**settings: Any) -> Callable[..., Any]:
    """--server-addr HOST:PORT, as `server run` prints it, as `server_addr`."""
    return click.option("--server-addr", metavar="HOST:PORT", callback=_host_and_port, **settings)


def _host_and_port(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        host, _, port = value.rpartition(":")
        if not host or "/" in value or not port.isdecimal() or not 0 < int(port) < 65536:
            raise click.BadParameter(f"'{value}' is not HOST:PORT, as in 127.0.0.1:8700")
    return value


def format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--format table|json, as `output`: every listing has it."""
    return click.option(
        "--format",
        "output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="How to print: a table for people or JSON for programs.",
    )(function)
