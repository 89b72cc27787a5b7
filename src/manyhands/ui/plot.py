"""The loss curve of a run as a picture. matplotlib is imported when a picture is drawn, without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manyhands.node.view import RunView

_INK, _SOFT, _LINE, _ACCENT, _BAD = "#17202b", "#55626f", "#e1e5ea", "#3b4fd8", "#b3261e"
_CLIENTS = ("#0b6fb8", "#c2500a", "#0a8560", "#b0427f", "#7a6400", "#2f8fae", "#6a41a8", "#6b7280")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPoints:
    """What is drawn: x is the round, y the loss. `clients` maps a name to its own training losses."""

    title: str
    unit: str
    training: Sequence[tuple[int, float]]
    validation: Sequence[tuple[int, float]]
    clients: dict[str, Sequence[tuple[int, float]]]
    lost: Sequence[tuple[int, str]] = ()


def points_of(view: RunView) -> LossPoints:
    """From a run's account; losses that are not known are left out."""
    names = {c.key: c.label or c.key[:8] for c in view.clients}
    clients: dict[str, list[tuple[int, float]]] = {}
    for closed in view.rounds:
        for counted in closed.counted:
            if counted.loss is not None:
                name = f"{names.get(counted.client, '')} {counted.client[:8]}".strip()
                clients.setdefault(name, []).append((closed.round, counted.loss))
    return LossPoints(
        title=view.name,
        unit=view.loss_unit,
        training=[(r.round, r.mean_loss) for r in view.rounds if r.mean_loss is not None],
        validation=[(e.round, e.loss) for e in view.evaluations if e.loss is not None],
        clients=dict(clients),
        lost=[
            (i.round, f"{names.get(i.client, i.client[:8])} lost")
            for i in view.incidents
            if i.what == "lost" and i.round is not None and i.round < view.total_rounds
        ],
    )


def loss_curve(points: LossPoints, path: Path) -> None:
    """Draw a PNG of 1600 x 900 pixels: clients faint, their mean strong, validation as rings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.625), dpi=160)
    try:
        figure.patch.set_facecolor("white")
        for at, (name, curve) in enumerate(points.clients.items()):
            color = _CLIENTS[at % len(_CLIENTS)]
            axes.plot(*_columns(with_gaps(curve)), color=color, lw=1.1, alpha=0.5, label=_plain(name))
        axes.plot(*_columns(points.training), color=_ACCENT, lw=2.6, label="training, mean of clients")
        axes.plot(*_columns(points.validation), color=_INK, lw=1, ls=(0, (2, 3)), alpha=0.6)
        axes.plot(
            *_columns(points.validation),
            "o",
            mfc="white",
            mec=_INK,
            mew=1.8,
            ms=7,
            label="validation",
            clip_on=False,
        )
        ends = {0: ((11, 3), "left"), len(points.validation) - 1: ((0, 11), "center")}
        for at, (offset, side) in ends.items() if points.validation else ():
            x, y = points.validation[at]
            axes.annotate(
                f"{y:.3f}", (x, y), offset, textcoords="offset points", ha=side, weight="bold", color=_INK
            )
        for x, name in points.lost:
            axes.axvline(x, color=_BAD, lw=1, ls=(0, (1, 3)))
            axes.annotate(
                _plain(name),
                (x, 1),
                (5, -10),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                color=_BAD,
                fontsize=9,
            )
        _style(axes, points)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    finally:
        pyplot.close(figure)


def _style(axes: object, points: LossPoints) -> None:
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator

    assert isinstance(axes, Axes)
    axes.set_title(_plain(points.title), loc="left", fontsize=14, fontweight="bold", color=_INK, pad=14)
    axes.set_xlabel("round", color=_SOFT)
    axes.set_ylabel(f"loss, {points.unit}" if points.unit else "loss", color=_SOFT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=_LINE)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.margins(x=0.02, y=0.1)
    axes.legend(frameon=False, fontsize=9, labelcolor=_SOFT, loc="upper right")


def with_gaps(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The curve with NaN between rounds that do not follow each other: a line is not drawn over what is missing."""
    points: list[tuple[int, float]] = []
    for x, y in curve:
        if points and x > points[-1][0] + 1:
            points.append((x - 1, math.nan))
        points.append((x, y))
    return points


def _columns(curve: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def _plain(text: str) -> str:
    """Names as they are: no mathematics between dollar signs, and no label that matplotlib would hide."""
    return text.replace("$", r"\$").lstrip("_") or "unnamed"
