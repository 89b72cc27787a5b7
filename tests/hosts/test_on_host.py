"""What is sent to the host: one text of the standard library, for Pythons older than ours."""

from __future__ import annotations

import ast
import sys

import pytest

from manyhands.hosts.agent import AGENT, SUPERVISOR, program


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
