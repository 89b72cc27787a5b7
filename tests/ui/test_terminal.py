from __future__ import annotations

import pytest

from manyhands.ui.terminal import human_bytes, human_seconds, printable, printable_lines, table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Zoë 漢字", "Zoë 漢字"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\nb\tc\rd", "a\\x0ab\\x09c\\x0dd"),
        ("right\u202eleft", "right\\x202eleft"),
    ],
)
def test_nothing_steers_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_printable_cuts_with_an_ellipsis() -> None:
    assert printable("abcdef", width=4) == "abc…"
    assert printable("abcd", width=4) == "abcd"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**30, "5.0 GiB"), (2**50, "1024.0 TiB")],
)
def test_bytes(size: int, text: str) -> None:
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59, "59 s"), (75, "1:15"), (3700, "1:01:40"), (3599.6, "1:00:00")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_table_aligns_and_never_wraps() -> None:
    rows = [{"name": "a", "n": 5, "x": None}, {"name": "long name \x1b[31m", "n": 12345, "x": "y" * 200}]
    lines = table(rows, {"name": "name", "n": "count", "x": "x"}).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("a" + " " * 20)
    assert lines[2].index("5") == lines[3].index("12345") + 4  # numbers to the right
    assert "\x1b" not in lines[3]
    assert lines[3].endswith("y" * 200)


def test_table_without_rows_has_its_heading() -> None:
    assert table([], {"a": "alpha"}).splitlines() == ["alpha", "─────"]


def test_lines_stay_lines() -> None:
    assert printable_lines("a\tb\nc\x1b[2J\r\n") == "a       b\nc\\x1b[2J\\x0d\n"
