"""Tensors and arrays over the same memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyhands.updates.views import as_array, as_arrays, as_tensors, like


def test_no_copy_either_way():
    tensor = torch.zeros(3)
    as_array(tensor)[0] = 5
    assert tensor[0] == 5
    array = np.zeros(3, np.float32)
    as_tensors({"w": array})["w"][1] = 6
    assert array[1] == 6


def test_a_tensor_with_a_gradient_or_strides_is_taken_too():
    assert as_array(torch.ones(2, requires_grad=True)).tolist() == [1, 1]
    assert as_arrays({"w": torch.arange(4.0).reshape(2, 2).T})["w"].tolist() == [[0, 2], [1, 3]]
    assert as_arrays({"w": torch.arange(4.0).reshape(2, 2).T})["w"].flags.c_contiguous


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.float64), np.zeros(2)])
def test_masters_are_fp32(tensor):
    with pytest.raises(TypeError, match="'w' is float64"):
        as_arrays({"w": tensor})


def test_the_kind_that_came_in_goes_out():
    array = np.zeros(1, np.float32)
    assert isinstance(like({"w": array})({"w": array})["w"], np.ndarray)
    assert isinstance(like({"w": torch.zeros(1)})({"w": array})["w"], torch.Tensor)
