"""A picture of grids as a PNG: rows of grids side by side, in the colours that ARC is usually drawn in.

An indexed-colour PNG needs a palette and zlib, so it is written here (W3C, PNG specification, third edition).
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

import numpy as np
import numpy.typing as npt

_PALETTE: Final = bytes.fromhex(
    "000000 0074d9 ff4136 2ecc40 ffdc00 aaaaaa f012be ff851b 7fdbff 870c25"  # colours 0 to 9
    "ffffff 555555"  # outside a grid; lines between cells
)
_OUTSIDE: Final = 10
_LINE: Final = 11
_CELL: Final = 10  # pixels of a cell, one of them its line
_GAP: Final = 8  # pixels around each grid


def draw(grids: npt.NDArray[np.uint8]) -> bytes:
    """A PNG of grids [rows, columns, S, S] with values 0 to 10 (10: outside the grid)."""
    canvas = np.concatenate([np.concatenate([_framed(g) for g in row], axis=1) for row in grids])
    return png(canvas)


def _framed(grid: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """One grid in large, with lines around the cells that are inside, and a gap around it."""
    side = grid.shape[0] * _CELL + 1
    large = np.full((side, side), _OUTSIDE, dtype=np.uint8)
    for (r, c), colour in np.ndenumerate(grid):
        if colour != _OUTSIDE:
            top, left = r * _CELL, c * _CELL
            large[top : top + _CELL + 1, left : left + _CELL + 1] = _LINE
    for (r, c), colour in np.ndenumerate(grid):
        if colour != _OUTSIDE:
            large[r * _CELL + 1 : (r + 1) * _CELL, c * _CELL + 1 : (c + 1) * _CELL] = colour
    return np.pad(large, _GAP, constant_values=_OUTSIDE)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """An indexed-colour PNG of palette indices [height, width]."""
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits of an index into the palette
    rows = np.pad(pixels, ((0, 0), (1, 0)))  # each row begins with its filter: 0, none
    parts = (
        (b"IHDR", header),
        (b"PLTE", _PALETTE),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
