"""What is sent to the host: one text of the standard library, for Pythons older than ours."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from manyhands.hosts.agent import AGENT, SUPERVISOR, program
from manyhands.hosts.on_host import supervisor
from manyhands.hosts.on_host.trainings import status_of


@pytest.mark.parametrize("modules", [AGENT, SUPERVISOR])
def test_it_is_one_program_of_the_standard_library(modules: tuple[str, ...]) -> None:
    tree = ast.parse(program(modules), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names
    names = [
        name
        for node in tree.body
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        )
    ]
    assert len(names) == len(set(names)), "a name of one module hides that of another"


@pytest.mark.parametrize(("counts_for", "told"), [("training", True), ("export", False)])
def test_memory_that_an_export_exhausted_is_not_what_killed_the_training(
    counts_for: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells only how many processes of the machine it has killed."""
    killed = tmp_path / "killed"
    killed.write_text("3")
    monkeypatch.setattr(supervisor, "killed_by_kernel", lambda: int(killed.read_text()))
    monkeypatch.setattr(supervisor.signal, "signal", lambda *_: None)
    count = {counts_for: "echo 4 > killed; "}
    training = f"mkdir -p checkpoints/step-00000010; sleep 4; {count.get('training', '')} kill -9 $$"
    job = {
        "command": ["/bin/sh", "-c", training],
        "export": ["/bin/sh", "-c", f"{count.get('export', '')} kill -9 $$"],
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    beside = supervisor.Supervisor(str(tmp_path))
    beside.carry_out()
    beside.log.close()
    ending = json.loads((tmp_path / "status.json").read_text())
    assert (ending["exports"], ending["signal"], ending.get("out_of_memory", False)) == (1, 9, told)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"state": "running"}', '{"state": "running", "boot": 1, "pid": 2}']
)
def test_a_status_that_no_supervisor_wrote_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(text)
    assert status_of(str(tmp_path)) is None
