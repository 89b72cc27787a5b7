"""Train one model with many machines: your GPUs, SSH hosts, institutions, or strangers on the internet.

What a program needs, and nothing else is public:

    plan = manyhands.load_plan("plan.yaml", ["rounds.total=8"])   # or manyhands.Plan(...), manyhands.resolve({...})
    manyhands.train(plan, directory)                              # this machine alone
    manyhands.simulate(plan, clients=4)                           # a run in one process, or a recorded run again
    manyhands.serve(plan)                                         # a server for the run
    manyhands.join(manyhands.ClientOptions(server_addr=..., run_id=..., identity=...))   # take part in it

The commands are thin over these. Names are loaded when they are first used: `import manyhands` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyhands.engine.run import TrainResult, train
    from manyhands.errors import ManyhandsError
    from manyhands.identity.keys import Identity
    from manyhands.node.client import ClientOptions, join
    from manyhands.node.server import ServerOptions, serve
    from manyhands.plan.chess_endgames import ChessEndgamesTask, EndgameLoss, EndgameModel
    from manyhands.plan.compose import load_plan
    from manyhands.plan.grids import GeneratedGrids, GridSet, GridsTask, PixelModel
    from manyhands.plan.resolve import resolve
    from manyhands.plan.schema import (
        Codec,
        Data,
        Evaluation,
        InnerOptimizer,
        LocalWork,
        Membership,
        Merge,
        OuterOptimizer,
        Plan,
        Rounds,
        Schedule,
    )
    from manyhands.plan.tables import Features, SurvivalTask, Table, TableSplit, TabularTask
    from manyhands.plan.tasks import CustomTask, DummyTask, LanguageModelTask, TextSource, Tokenizer
    from manyhands.simulation import RecordedRun, Replayed, Simulated, simulate

__version__ = "0.1.0"

_HOMES = {
    "manyhands.engine.run": ("TrainResult", "train"),
    "manyhands.errors": ("ManyhandsError",),
    "manyhands.identity.keys": ("Identity",),
    "manyhands.node.client": ("ClientOptions", "join"),
    "manyhands.node.server": ("ServerOptions", "serve"),
    "manyhands.plan.chess_endgames": ("ChessEndgamesTask", "EndgameLoss", "EndgameModel"),
    "manyhands.plan.grids": ("GeneratedGrids", "GridSet", "GridsTask", "PixelModel"),
    "manyhands.plan.compose": ("load_plan",),
    "manyhands.plan.resolve": ("resolve",),
    "manyhands.plan.schema": (
        "Codec",
        "Data",
        "Evaluation",
        "InnerOptimizer",
        "LocalWork",
        "Membership",
        "Merge",
        "OuterOptimizer",
        "Plan",
        "Rounds",
        "Schedule",
    ),
    "manyhands.plan.tables": ("Features", "SurvivalTask", "Table", "TableSplit", "TabularTask"),
    "manyhands.plan.tasks": ("CustomTask", "DummyTask", "LanguageModelTask", "TextSource", "Tokenizer"),
    "manyhands.simulation": ("RecordedRun", "Replayed", "Simulated", "simulate"),
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ChessEndgamesTask",
    "ClientOptions",
    "Codec",
    "CustomTask",
    "Data",
    "DummyTask",
    "EndgameLoss",
    "EndgameModel",
    "Evaluation",
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


def __getattr__(name: str) -> Any:
    module = _WHERE.get(name)
    if module is None:
        raise AttributeError(
            f"module 'manyhands' has no attribute '{name}'; public names: {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return list(__all__)
