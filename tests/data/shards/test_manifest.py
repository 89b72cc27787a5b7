"""The task of shards, and the task that is to be trained on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manyhands.data.shards.manifest import Manifest, check_task, read_manifest
from manyhands.errors import PlanError
from manyhands.plan.schema import Plan


@pytest.fixture
def manifest(make_shards: Callable[..., Path]) -> Manifest:
    return read_manifest(make_shards()).model_copy(
        update={"task": {"name": "grids", "size": 12, "variants": 2}}
    )


@pytest.mark.parametrize("more", [{}, {"model": {"width": 128}}, {"context": 3}])
def test_the_same_data(manifest: Manifest, more: dict[str, Any]) -> None:
    """With another model, or a setting written out that has its default value in the shards."""
    check_task(
        manifest, Plan.parse({"task": {"name": "grids", "size": 12, "variants": 2, **more}}), Path("dir")
    )


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"name": "grids", "size": 10, "variants": 2},
            r"'task\.size' is 10, and the shards in dir .* made with 12",
        ),
        ({"name": "grids", "size": 12}, r"'task\.variants' is 8, and the shards in dir were made with 2"),
        ({"name": "language_model"}, r"'task\.name' is 'language_model', and .* with 'grids'"),
    ],
)
def test_other_data(manifest: Manifest, task: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_task(manifest, Plan.parse({"task": task}), Path("dir"))
