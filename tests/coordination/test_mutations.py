"""Each of the ten mutations is found by the test that its list names; without one, the same tests pass."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("coordination_mutations", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


MUTATIONS: tuple[Any, ...] = _load(HERE / "mutations.py").MUTATIONS


class Copy:
    """The package and its tests in a directory of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignore = shutil.ignore_patterns("__pycache__", "test_mutations.py")
        shutil.copytree(ROOT / "src", root / "src", ignore=ignore)
        shutil.copytree(HERE, root / "tests" / "coordination", ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", root)
        # So that no bytecode of the unmutated file is taken for the mutated one of the same size and second.
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(root / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CHAOS_EXAMPLES": "40",
        }

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def test(self, *files: str) -> subprocess.CompletedProcess[str]:
        return self.run(
            "-m",
            "pytest",
            "-x",
            "-n0",
            "-p",
            "no:cacheprovider",
            *(f"tests/coordination/{file}" for file in files),
        )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("mutated"))


def test_the_list_has_ten_of_different_kinds() -> None:
    assert len(MUTATIONS) == 10
    assert len({mutation.name for mutation in MUTATIONS}) == 10
    assert {mutation.breaks[0] for mutation in MUTATIONS} == set("1234567"), (
        "every invariant is put to the test"
    )


@pytest.mark.slow
def test_the_unmutated_copy_passes(copy: Copy) -> None:
    where = copy.run("-c", "import manyhands; print(manyhands.__file__)").stdout
    assert where.startswith(str(copy.root)), "the copy is what is tested"
    done = copy.test(*sorted({mutation.found_by for mutation in MUTATIONS}))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_found(copy: Copy, mutation: Any) -> None:
    path = copy.root / "src" / "manyhands" / "coordination" / mutation.file
    original = path.read_text()
    assert original.count(mutation.source) == 1, f"{mutation.name}: {mutation.file} has changed"
    path.write_text(original.replace(mutation.source, mutation.replacement))
    try:
        done = copy.test(mutation.found_by)
    finally:
        path.write_text(original)
    failed_tests = 1  # pytest's exit code; 2 and more: it did not come to that
    assert done.returncode == failed_tests, f"nothing has noticed that {mutation.name}\n{done.stdout}"
