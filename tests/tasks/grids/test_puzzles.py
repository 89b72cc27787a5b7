from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manyhands.errors import DataError
from manyhands.tasks.grids.puzzles import read_arc

REAL = Path(__file__).parents[4] / "shared" / "data" / "arc-agi"


def test_files_come_by_name_and_the_test_pairs_last(arc: Path) -> None:
    (arc / "notes.txt").write_text("not a puzzle")
    read = read_arc(arc, 8, "stop")
    assert [puzzle.origin for puzzle in read.puzzles] == [{"file": "a.json"}, {"file": "b.json"}]
    assert [(len(puzzle.pairs), puzzle.tests) for puzzle in read.puzzles] == [(4, 1), (4, 2)]
    scene, answer = read.puzzles[1].pairs[2]
    assert scene.tolist() == [[3, 3, 3]] * 3
    assert answer.tolist() == [[4, 4]] * 3
    assert (read.broken, read.too_large) == ({}, ("large.json",))
    assert len(read_arc(arc, 9, "stop").puzzles) == 3


GOOD = {"input": [[1]], "output": [[2]]}
BROKEN: list[tuple[Any, str]] = [
    (b"{", "Expecting property name"),
    (b"\xff\xfe", "can't decode"),
    (b"[" * 100_000, "recursion"),
    ([1], r"it holds \[1\]"),
    ({"train": [GOOD]}, "'test' is None"),
    ({"train": [], "test": [GOOD]}, r"'train' is \[\]"),
    ({"train": [GOOD], "test": [{"input": [[1]]}]}, r"test\[0\]\.output is None"),
    ({"train": [3], "test": [GOOD]}, r"train\[0\] is 3"),
    (
        {"train": [{"input": [[1, 2], [3]], "output": [[1]]}], "test": [GOOD]},
        "row 1 has 1 cells, .* first has 2",
    ),
    ({"train": [{"input": [[]], "output": [[1]]}], "test": [GOOD]}, r"row 0 is \[\]"),
    ({"train": [{"input": [[1]] * 31, "output": [[1]]}], "test": [GOOD]}, "1 to 30 rows"),
    ({"train": [{"input": [[10]], "output": [[1]]}], "test": [GOOD]}, "cell 10: expected 0 to 9"),
    ({"train": [{"input": [[True]], "output": [[1]]}], "test": [GOOD]}, "cell True"),
    ({"train": [{"input": [[1.0]], "output": [[1]]}], "test": [GOOD]}, "cell 1.0"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_a_broken_file_stops_or_is_skipped(arc: Path, content: Any, message: str) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (arc / "broken.json").write_bytes(data)
    with pytest.raises(DataError, match=rf"broken\.json: (?s:.)*{message}(?s:.)*task.on_broken=skip"):
        read_arc(arc, 8, "stop")
    read = read_arc(arc, 8, "skip")
    assert list(read.broken) == ["broken.json"]
    assert len(read.puzzles) == 2


def test_a_directory_of_no_use_says_why(arc: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file.*or 'generated'"):
        read_arc(tmp_path / "nowhere", 8, "skip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none of 0 JSON files"):
        read_arc(tmp_path / "empty", 8, "skip")
    (arc / "c.json").write_text("?")
    with pytest.raises(
        DataError, match=r"none of 4 JSON files .*1 broken, 3 with .* larger than task.size 2"
    ):
        read_arc(arc, 2, "skip")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"ARC's files are not in {REAL}")
def test_all_of_arc_can_be_read() -> None:
    for part in ("training", "evaluation"):
        read = read_arc(REAL / part, 30, "stop")
        assert (len(read.puzzles), read.too_large) == (400, ())
        assert all(len(puzzle.pairs) > puzzle.tests >= 1 for puzzle in read.puzzles)
