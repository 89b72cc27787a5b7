from __future__ import annotations

import numpy as np

from manyhands.data.generated_tables import generated_answers, generated_survival
from manyhands.data.tables import Faults, typed_columns


def test_tables_come_from_their_seed_and_are_clean() -> None:
    for make in (
        lambda seed: generated_answers("classification", 300, seed),
        lambda seed: generated_answers("regression", 300, seed),
        lambda seed: generated_survival(300, seed),
    ):
        rows = make(1)
        assert rows == make(1)
        assert rows.cells != make(2).cells
        numbers, _, sound = typed_columns(rows, rows.columns, [], Faults(stop=True))
        assert sound.all()
        assert len(rows.cells) == len(set(rows.cells)) == 300
        assert np.abs(numbers["x5"].mean()) < 0.2


def test_answers_have_both_classes_and_some_times_are_censored() -> None:
    rows = generated_answers("classification", 2000, 0)
    numbers, _, _ = typed_columns(rows, ["target"], [], Faults(stop=True))
    assert 0.35 < numbers["target"].mean() < 0.65
    rows = generated_survival(2000, 0)
    numbers, _, _ = typed_columns(rows, ["time", "event"], [], Faults(stop=True))
    assert 0.5 < numbers["event"].mean() < 0.75
    assert (numbers["time"] >= 0).all()
