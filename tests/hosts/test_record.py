"""What is kept here of trainings on hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyhands.errors import PlanError
from manyhands.hosts.record import Part, Record, all_recorded, run_named


def test_a_broken_record_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYHANDS_HOME", str(tmp_path))
    assert all_recorded() == {}
    record = Record(run="sound", parts=(Part(host="server1", directory="/r"),))
    record.keep_in(tmp_path / "runs" / "sound")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "host.json").write_text("{")
    told: list[str] = []
    assert all_recorded(told.append) == {tmp_path / "runs" / "sound": record}
    (text,) = told
    assert text.startswith(f"left out: {tmp_path / 'runs' / 'broken' / 'host.json'}: ")
    with pytest.raises(PlanError, match="Did you mean 'sound'"):
        run_named("soud")
