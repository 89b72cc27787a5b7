from __future__ import annotations

import io

import matplotlib.image
import numpy as np

from manyhands.tasks.grids.picture import draw, png


def pixels_of(data: bytes) -> np.ndarray:
    """Red, green and blue of a PNG, 0 to 255, as another reader sees them."""
    return np.rint(matplotlib.image.imread(io.BytesIO(data), format="png")[..., :3] * 255).astype(int)


def test_another_program_reads_our_png() -> None:
    read = pixels_of(png(np.array([[0, 1, 10], [2, 9, 11]], dtype=np.uint8)))
    assert read.shape == (2, 3, 3)
    assert read[0].tolist() == [[0, 0, 0], [0, 0x74, 0xD9], [255, 255, 255]]
    assert read[1].tolist() == [[0xFF, 0x41, 0x36], [0x87, 0x0C, 0x25], [0x55, 0x55, 0x55]]


def test_grids_lie_side_by_side_and_what_is_outside_is_left_white() -> None:
    grids = np.full((2, 3, 2, 2), 10, dtype=np.uint8)
    grids[1, 2, 0, 0] = 3
    read = pixels_of(draw(grids))
    side = 2 * 10 + 1 + 2 * 8
    assert read.shape == (2 * side, 3 * side, 3)
    coloured = np.argwhere((read != 255).any(axis=-1))
    assert coloured.min(axis=0).tolist() == [side + 8, 2 * side + 8]
    assert coloured.max(axis=0).tolist() == [side + 8 + 10, 2 * side + 8 + 10]
    assert read[side + 13, 2 * side + 13].tolist() == [0x2E, 0xCC, 0x40]
