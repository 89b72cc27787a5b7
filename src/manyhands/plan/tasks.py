"""What a plan says about its task: one settings class per family of tasks/registry.py, told apart by `name`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from manyhands.config import MISSING, Settings
from manyhands.plan.chess_endgames import ChessEndgamesTask as ChessEndgamesTask
from manyhands.plan.chess_endgames import EndgameLoss as EndgameLoss
from manyhands.plan.chess_endgames import EndgameModel as EndgameModel
from manyhands.plan.fine_tuning import Adapter as Adapter
from manyhands.plan.fine_tuning import FineTuned as FineTuned
from manyhands.plan.grids import GeneratedGrids as GeneratedGrids
from manyhands.plan.grids import GridSet as GridSet
from manyhands.plan.grids import GridsTask as GridsTask
from manyhands.plan.grids import PixelModel as PixelModel
from manyhands.plan.language_model import LanguageModelTask as LanguageModelTask
from manyhands.plan.language_model import TextSource as TextSource
from manyhands.plan.language_model import Tokenizer as Tokenizer
from manyhands.plan.tables import Features as Features
from manyhands.plan.tables import SurvivalTask as SurvivalTask
from manyhands.plan.tables import Table as Table
from manyhands.plan.tables import TableSplit as TableSplit
from manyhands.plan.tables import TabularTask as TabularTask

Count = Annotated[int, Field(ge=1)]


class DummyTask(Settings):
    """No model: a worker without torch that sleeps and sends an update of the wanted size. For tests and
    benches."""

    name: Literal["dummy"] = "dummy"
    """dummy: no model and no torch; a worker that sleeps and sends an update of the wanted size."""
    parameters: Count = 2_500_000
    """Number of fp32 parameters, hence 4 bytes each in a dense update."""
    tensors: Count = 4
    """Into how many tensors they are divided."""
    samples: Count = 1_000_000
    """Size of the pretended data set."""
    delay_s: Annotated[float, Field(ge=0)] = 0.0
    """How long one round of work sleeps."""


class CustomTask(Settings):
    """A user's own task, by dotted name. A client runs it only when its owner has allowed that name."""

    name: Literal["custom"] = "custom"
    """custom: a user's own task, by dotted name."""
    target: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
            json_schema_extra={
                MISSING: "name your own task as task.target=module:object; `manyhands init` writes one."
            },
        ),
    ]
    """module:object, importable on every client; object implements the Task protocol."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Handed to the task as it is."""


_FINE_TUNING: Final = frozenset(FineTuned.model_fields) - {"name"}

MODEL_SETTINGS: Final[Mapping[str, frozenset[str]]] = {
    "language_model": _FINE_TUNING | {"model_type", "model"},
    "grids": _FINE_TUNING | {"model"},
    "chess_endgames": _FINE_TUNING | {"model", "loss"},
    "tabular": _FINE_TUNING | {"hidden_sizes"},
    "survival": _FINE_TUNING | {"hidden_sizes"},
}
"""name -> the settings of a task that its samples do not depend on: they may change over shards that are made."""

TaskSettings = Annotated[
    LanguageModelTask | GridsTask | ChessEndgamesTask | TabularTask | SurvivalTask | DummyTask | CustomTask,
    Field(discriminator="name"),
]
