"""Text for terminals: tables, sizes, durations, and names that cannot steer the terminal.

What comes from others (labels, reasons) goes through `printable`: an escape sequence in a client's label must not
move the cursor of whoever looks at it.
"""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import click


def printable(text: str, *, width: int | None = None) -> str:
    """`text` with control and format characters shown as \\xNN, cut to `width` characters with an ellipsis."""
    safe = "".join(
        character if unicodedata.category(character)[0] != "C" else f"\\x{ord(character):02x}"
        for character in text
    )
    return safe if width is None or len(safe) <= width else safe[: width - 1] + "…"


def printable_lines(text: str) -> str:
    """The same for text of several lines, which stay lines; tabs become blanks."""
    return "\n".join(printable(line.expandtabs()) for line in text.split("\n"))


def short_key(key: str) -> str:
    """The first eight hex digits: how a key is shown where it only has to be told from its neighbours."""
    return key[:8]


def human_bytes(size: float | None) -> str:
    """1536 -> '1.5 KiB'; '-' where nothing is known."""
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'; under a minute '12 s', under ten seconds '3.4 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def human_rate(per_second: float | None) -> str:
    """Tokens per second with thousands separated; '-' where nothing is known."""
    return "-" if per_second is None else f"{per_second:,.0f}"


def human_loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def terminal_width() -> int | None:
    """Columns of the terminal that is written to; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], output: str) -> None:
    """Print a listing: `columns` maps a row's key to its heading; `output` is 'table' or 'json' (whole rows)."""
    if output == "json":
        print_json(list(rows))
    else:
        click.echo(table(rows, columns))


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Aligned columns, numbers to the right; never wrapped or cut, so that it can be read through a pipe."""
    cells = [[_cell(row.get(key)) for key in columns] for row in rows]
    right = [
        bool(rows) and all(isinstance(row.get(key), int | float | None) for row in rows) for key in columns
    ]
    headings = list(columns.values())
    widths = [max(len(line[i]) for line in [headings, *cells]) for i in range(len(headings))]

    def line(parts: Sequence[str]) -> str:
        aligned = (
            part.rjust(w) if r else part.ljust(w) for part, w, r in zip(parts, widths, right, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(headings), line(["─" * w for w in widths]), *(line(parts) for parts in cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(str(value))
