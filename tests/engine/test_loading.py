"""Which samples a step has."""

from types import SimpleNamespace

import numpy as np
import pytest

from manyhands.engine.loading import step_indices
from manyhands.engine.world import World


@pytest.mark.parametrize(("batch_size", "steps"), [(1000, 11), (6000, 3), (2, 5000)])
def test_steps_taken_together_have_the_samples_of_steps_taken_singly(batch_size: int, steps: int) -> None:
    """However many steps have their order computed in one call, and across the end of an epoch."""
    task = SimpleNamespace(samples=lambda: 4321)
    world = World(data_rank=1, data_size=2)
    together = list(step_indices(task, 77, batch_size, steps, 5, world))
    singly = [next(step_indices(task, 77 + i * batch_size, batch_size, 1, 5, world)) for i in range(steps)]
    assert np.array_equal(together, singly)
    assert together[0].dtype == np.int64
    assert np.shape(together) == (steps, batch_size // 2)
