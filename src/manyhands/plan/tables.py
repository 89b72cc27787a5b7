"""What a plan says about the tasks on tables: rows, their split, features, and what is to be learned."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from manyhands.config import LocalPath, Settings
from manyhands.plan.fine_tuning import FineTuned

Count = Annotated[int, Field(ge=1)]


def _says_more_than(settings: Settings, name: str) -> bool:
    """Whether a setting other than `name` differs from its default."""
    fields = type(settings).model_fields
    return any(getattr(settings, other) != fields[other].default for other in fields if other != name)


class Table(Settings):
    """Rows from CSV files, or generated ones. Read once, by whoever prepares the run."""

    files: tuple[LocalPath, ...] = ()
    """CSV files in UTF-8, with the same columns; none: a generated table, seeded by the plan."""
    generated_rows: Annotated[int, Field(ge=50)] | None = None
    """Rows of the generated table; null: 2000."""
    column_names: tuple[str, ...] = ()
    """The columns' names, for files without a header; none: the first line of each file is its header."""
    separator: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """Between two cells."""
    missing: tuple[str, ...] = ("", "?", "NA", "NaN", "nan")
    """Cells that stand for a missing value."""
    on_broken: Literal["stop", "skip"] = "stop"
    """A line with too few or too many cells, or with text where a number is expected, or a whole file that is
    missing, empty or not UTF-8: stop, naming file and line; or skip it, counted in the run's record. Where no file is
    left, and where a file has other columns than the first, it always stops."""

    @model_validator(mode="after")
    def _either_files_or_generated(self) -> Self:
        if self.files and self.generated_rows is not None:
            raise ValueError(
                "'generated_rows' is for the generated table, and files are given: leave one out"
            )
        if not self.files and _says_more_than(self, "generated_rows"):
            raise ValueError("the other settings of the table are for files: give files, or leave them out")
        return self


class TableSplit(Settings):
    """Which rows are for validation."""

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Chance of a row to be for validation, decided by a hash of the plan's seed and the row's cells, so that
    equal rows stay together; null: 0.2, or as `column` says."""
    column: str | None = None
    """A column that names each row's split."""
    file: LocalPath | None = None
    """A CSV file with a header that holds `column`, and `key` to match its rows; null: the table itself."""
    key: str | None = None
    """A column that table and `file` have in common, without duplicates; it is no feature."""
    training: tuple[str, ...] = ("train",)
    """What `column` says of training rows."""
    validation: tuple[str, ...] = ("test",)
    """What `column` says of validation rows; rows with anything else are left out, counted."""

    @model_validator(mode="after")
    def _one_way_to_split(self) -> Self:
        if (self.file is None) != (self.key is None):
            raise ValueError("'file' and 'key' of a split go together: give both or none")
        if self.column is None and _says_more_than(self, "share"):
            raise ValueError("a split by file or names needs 'column', which names each row's split")
        if self.column is not None and self.share is not None:
            raise ValueError("'share' and 'column' are two ways to split: give one")
        if set(self.training) & set(self.validation):
            raise ValueError("'training' and 'validation' share a name: a row is for one of them")
        return self


class Features(Settings):
    """How columns become numbers."""

    columns: tuple[str, ...] = ()
    """The columns to learn from; none: all that the target and the split do not name."""
    without: tuple[str, ...] = ()
    """Columns to leave out, where `columns` names none."""
    categorical: tuple[str, ...] = ()
    """Columns that become one 0/1 feature per category of the training rows; others, met later, are all
    zeros. Numbers are compared as numbers: 1 and 1.0 are one category."""
    drop_first: bool = False
    """Leave out the first category of each, which the others then imply."""
    standardize: Literal["numeric", "all", "none"] = "numeric"
    """Subtract the mean and divide by the deviation of the training rows: of numeric columns, of all
    features, or of none."""
    on_missing: Literal["drop", "mean", "indicator"] = "mean"
    """A missing value: drop the row; take the training rows' mean (of categories: all zeros); or that, and one
    more feature that says so. A row without a target is always dropped. All are counted."""
    statistics: LocalPath | None = None
    """A statistics.json to use instead of what the training rows give: agreed means, deviations and
    categories."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        if self.columns and self.without:
            raise ValueError("'without' is for features that 'columns' does not name: give one of the two")
        if self.drop_first and not self.categorical:
            raise ValueError("'drop_first' needs 'categorical' columns")
        if self.statistics is not None and (self.drop_first or self.standardize != "numeric"):
            raise ValueError("'statistics' says what is dropped and standardized: leave those settings out")
        return self


class TabularTask(FineTuned):
    """Classification or regression on the rows of a table: a linear model or a multi-layer perceptron."""

    name: Literal["tabular"] = "tabular"
    """tabular: classification or regression on CSV files, or on a generated table."""
    weights: LocalPath | None = None
    """Existing weights to start from: a checkpoint of a training of this task, by its directory, with the same hidden
    layers. How columns become numbers and what the answers mean is then as it was for them; null: random weights."""
    problem: Literal["classification", "regression"] = "classification"
    """classification: cross-entropy over the target's values in the training rows; regression: squared error
    of the target, standardized."""
    target: str = "target"
    """The column to predict; or a comparison that makes two classes of it, as in `num > 0` or
    `stage == III`."""
    table: Table = Table()
    """The rows."""
    split: TableSplit = TableSplit()
    """Which of them are for validation."""
    features: Features = Features()
    """How columns become numbers."""
    hidden_sizes: tuple[Count, ...] = (32, 32)
    """Widths of the hidden layers; none ([]): logistic or linear regression."""


class SurvivalTask(FineTuned):
    """Survival on the rows of a table: Cox proportional hazards (Breslow's ties), linear or with hidden
    layers."""

    name: Literal["survival"] = "survival"
    """survival: Cox proportional hazards on CSV files, or on a generated table."""
    weights: LocalPath | None = None
    """Existing weights to start from: a checkpoint of a training of this task, by its directory, with the same hidden
    layers. How columns become numbers and what the answers mean is then as it was for them; null: random weights."""
    time: str = "time"
    """The column of times, to the event or to the end of observation; above zero or zero."""
    event: str = "event"
    """The column that is 1 where the event was seen and 0 where observation ended before; or a comparison,
    as in `status == dead`."""
    table: Table = Table()
    """The rows."""
    split: TableSplit = TableSplit()
    """Which of them are for validation."""
    features: Features = Features()
    """How columns become numbers."""
    hidden_sizes: tuple[Count, ...] = ()
    """Widths of the hidden layers; none ([]): Cox regression."""
