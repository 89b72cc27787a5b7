"""Generated tables, so that the table tasks run with nothing downloaded: seeded, and with an answer to find.

Six columns x0 to x5, standard normal; x4 and x5 mean nothing. They go through the same reading as files do:
cells are text.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from manyhands.data.tables import Rows

DEFAULT_ROWS = 2000
FEATURES = 6

Numbers = npt.NDArray[np.float64]


def generated_answers(problem: Literal["classification", "regression"], rows: int, seed: int) -> Rows:
    """With a column `target`: a product, a square and a line of x0 to x3, which no linear model finds.

    regression: that score, plus normal noise of deviation 0.5. classification: 1 with the probability that
    the logistic function gives twice the score, else 0.
    """
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, FEATURES))
    score = 2 * x[:, 0] * x[:, 1] + x[:, 2] ** 2 - 1 + x[:, 3]
    if problem == "regression":
        return _rows(x, {"target": score + 0.5 * generator.standard_normal(rows)})
    target = generator.random(rows) < 1 / (1 + np.exp(-2 * score))
    return _rows(x, {"target": target.astype(np.float64)})


def generated_survival(rows: int, seed: int) -> Rows:
    """With columns `time` and `event`: exponential times of hazard exp(x0 - 0.7 x1 + 0.5 x2), observed until
    an exponential time of censoring, which comes first in about two of five rows.
    """
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, FEATURES))
    death = generator.exponential(size=rows) / np.exp(x[:, 0] - 0.7 * x[:, 1] + 0.5 * x[:, 2])
    censoring = generator.exponential(scale=2.0, size=rows)
    event = (death <= censoring).astype(np.float64)
    return _rows(x, {"time": np.minimum(death, censoring), "event": event})


def _rows(x: Numbers, answers: dict[str, Numbers]) -> Rows:
    columns = [*(f"x{i}" for i in range(x.shape[1])), *answers]
    values = np.column_stack([x, *answers.values()]).round(6)
    cells = tuple(
        tuple(f"{value:g}" if value.is_integer() else repr(value) for value in row) for row in values.tolist()
    )
    return Rows(
        columns=tuple(columns), cells=cells, places=tuple(f"generated:{i + 1}" for i in range(len(cells)))
    )
