"""Chess positions as a PNG: boards side by side, White (the mover) below, a move as an arrow, the FEN underneath."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

COLUMNS: Final = 4
_SIDE: Final = 3.1  # inches of a board with its words
_LIGHT, _DARK, _ARROW = "#f0d9b5", "#b58863", "#2c7fb8"
_GLYPHS: Final = " ♟♞♝♜♛♚"
"""By kind; both sides are drawn with the filled pieces of DejaVu Sans, which comes with matplotlib."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A board. `squares`: uint8 [64] as in records (truth.py). `move`: from and to, to be drawn."""

    squares: npt.NDArray[np.uint8]
    title: str
    fen: str
    move: tuple[int, int] | None = None


def draw(boards: Sequence[Shown]) -> bytes:
    """A PNG of at least one board, COLUMNS in a row. Uses no display and leaves matplotlib's state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(boards) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * _SIDE, rows * (_SIDE + 0.45)), layout="constrained", dpi=80)
    FigureCanvasAgg(figure)
    for place, axes in enumerate(figure.subplots(rows, COLUMNS, squeeze=False).flat):
        if place < len(boards):
            _board(axes, boards[place])
        else:
            axes.set_axis_off()
    written = io.BytesIO()
    figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def _board(axes: Any, shown: Shown) -> None:
    from matplotlib.colors import ListedColormap

    axes.imshow(np.indices((8, 8)).sum(axis=0) % 2, cmap=ListedColormap([_DARK, _LIGHT]), origin="lower")
    for square, code in enumerate(shown.squares.tolist()):
        if code:
            mine = code <= 6
            _piece(axes, square, _GLYPHS[(code - 1) % 6 + 1], fill="white" if mine else "black")
    if shown.move is not None:
        (x, y), (to_x, to_y) = ((square % 8, square // 8) for square in shown.move)
        axes.annotate(
            "",
            xy=(to_x, to_y),
            xytext=(x, y),
            arrowprops={"arrowstyle": "-|>", "color": _ARROW, "lw": 2.5, "mutation_scale": 16},
        )
    axes.set_xticks(range(8), "abcdefgh")
    axes.set_yticks(range(8), "12345678")
    axes.tick_params(length=0, labelsize=8)
    axes.set_title(shown.title, fontsize=9)
    axes.set_xlabel(shown.fen, fontsize=7)


def _piece(axes: Any, square: int, glyph: str, fill: str) -> None:
    from matplotlib.patheffects import withStroke

    axes.text(
        square % 8,
        square // 8 - 0.05,
        glyph,
        fontsize=21,
        family="DejaVu Sans",
        ha="center",
        va="center",
        color=fill,
        path_effects=[withStroke(linewidth=1.6, foreground="black" if fill == "white" else "white")],
    )
