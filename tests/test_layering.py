"""What the layering contracts of pyproject.toml cover; import-linter itself runs in `make check`."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WITH_TORCH = {"updates", "tasks", "engine", "simulation", "node.workers"}


def test_everything_but_the_packages_with_torch_is_forbidden_to_import_it() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (torch,) = (c for c in contracts if "torch" in c.get("forbidden_modules", ()))
    covered = {name.removeprefix("manyhands.") for name in torch["source_modules"]}
    package = ROOT / "src" / "manyhands"
    modules = {
        *(p.stem for p in package.glob("*.py") if not p.stem.startswith("__")),
        *(p.parent.name for p in package.glob("*/__init__.py")),
        *(f"node.{p.stem}" for p in (package / "node").glob("*.py") if p.stem != "__init__"),
        *(f"node.{p.parent.name}" for p in (package / "node").glob("*/__init__.py")),
    } - {"node"}
    assert modules - WITH_TORCH == covered
