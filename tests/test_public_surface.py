"""What is public: nothing more, nothing less, and cheap to import."""

from __future__ import annotations

import subprocess
import sys
import types
import typing

import pytest

import manyhands

PUBLIC = [
    "ChessEndgamesTask",
    "ClientOptions",
    "Codec",
    "CustomTask",
    "Data",
    "DummyTask",
    "Evaluation",
    "EndgameLoss",
    "EndgameModel",
    "Features",
    "GeneratedGrids",
    "GridSet",
    "GridsTask",
    "Identity",
    "InnerOptimizer",
    "LanguageModelTask",
    "LocalWork",
    "ManyhandsError",
    "Membership",
    "Merge",
    "OuterOptimizer",
    "PixelModel",
    "Plan",
    "RecordedRun",
    "Replayed",
    "Rounds",
    "Schedule",
    "ServerOptions",
    "Simulated",
    "SurvivalTask",
    "Table",
    "TableSplit",
    "TabularTask",
    "TextSource",
    "Tokenizer",
    "TrainResult",
    "__version__",
    "join",
    "load_plan",
    "resolve",
    "serve",
    "simulate",
    "train",
]


def test_the_public_names_are_these() -> None:
    assert sorted(manyhands.__all__) == sorted(PUBLIC)
    others = {n for n in vars(manyhands) if not n.startswith("_")} - set(PUBLIC)
    modules = {n for n in others if isinstance(getattr(manyhands, n), types.ModuleType)}
    assert others - modules == {"TYPE_CHECKING", "Any", "annotations"}


@pytest.mark.parametrize("name", [n for n in PUBLIC if n != "__version__"])
def test_each_is_there_and_documented(name: str) -> None:
    found = getattr(manyhands, name)
    assert found.__doc__, f"{name} has no docstring"


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="public names: ChessEndgamesTask, ClientOptions"):
        _ = manyhands.trainn


def test_the_plan_is_made_of_public_types() -> None:
    public = {getattr(manyhands, name) for name in PUBLIC}
    for field in manyhands.Plan.model_fields.values():
        for part in typing.get_args(field.annotation) or (field.annotation,):
            if isinstance(part, type) and part.__module__ == "manyhands.plan.schema":
                assert part in public, part


def test_importing_manyhands_loads_nothing_heavy() -> None:
    code = (
        "import sys, manyhands; dir(manyhands); "
        "print([m for m in ('torch', 'pydantic', 'fastapi', 'hydra', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_server_and_a_client_node_load_no_torch() -> None:
    code = (
        "import sys, manyhands; manyhands.serve; manyhands.join; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
