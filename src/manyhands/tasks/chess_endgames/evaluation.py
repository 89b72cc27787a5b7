"""The loss of the endgame transformer, and what an evaluation measures beside it.

    value_accuracy     share of positions whose likeliest outcome is the true one
    policy_accuracy    share of positions whose likeliest move keeps the best outcome that a legal move has
    moves_left_error   mean difference, in plies, from the distance to the next capture or pawn move, of won and lost
                       positions

The listings are two confusion tables, of the value (truth against the likeliest outcome) and of the policy (the best
outcome that a move has against that of the likeliest move), and the worst errors of each as positions: those in which
the model was surest of something wrong. A picture shows them as boards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from manyhands.plan.chess_endgames import EndgameLoss
from manyhands.tasks.chess_endgames.boards import to_fen
from manyhands.tasks.chess_endgames.network import PLIES, Outputs
from manyhands.tasks.chess_endgames.pictures import Shown, draw
from manyhands.tasks.protocol import Batch, Listing, Loss, Metrics, Task

OUTCOMES: Final = ("loss", "draw", "win")
LISTED: Final = 8
"""Errors of the value, and of the policy, that are kept."""
_DRAW: Final = 1
_NO_MOVE: Final = 255  # outcome of the padding


# ------------------------------------------------------------------------------------------ the loss
def outputs_of(model: torch.nn.Module, batch: Batch) -> Outputs:
    return cast(Outputs, model(batch["squares"], batch["en_passant"], batch["moves"]))


def loss_of(outputs: Outputs, batch: Batch, weights: EndgameLoss) -> Loss:
    """The weighted sum of cross-entropies of value and policy, in nats, and the Huber loss of moves left; in fp32."""
    value, policy, moves_left = (output.float() for output in outputs)
    parts: dict[str, torch.Tensor] = {}
    if weights.value:
        parts["value"] = F.cross_entropy(value, batch["value"].long())
    if weights.policy:
        best = batch["best"].float()
        target = best / best.sum(dim=1, keepdim=True)
        parts["policy"] = -(target * policy.log_softmax(dim=1)).sum(dim=1).mean()
    if weights.moves_left:
        decided = _distance_known(batch).float()
        off = F.huber_loss(moves_left, batch["dtz"].float().abs() / PLIES, reduction="none")
        parts["moves_left"] = (off * decided).sum() / decided.sum().clamp(min=1)
    weighted = torch.stack([getattr(weights, name) * part for name, part in parts.items()])
    return Loss(mean=weighted.sum(), count=len(value), parts=parts)


def _distance_known(batch: Batch) -> torch.Tensor:
    """bool [B]: won and lost positions; not those that were imported without their distance."""
    return (batch["value"] != _DRAW) & (batch["dtz"] != 0)


# ------------------------------------------------------------------------------------------ the measures
class EndgameMetrics(Metrics):
    """Counts, and the worst errors, of one evaluation."""

    def __init__(self, task: Task, weights: EndgameLoss) -> None:
        super().__init__(task)
        self._weights = weights
        self._value = np.zeros((3, 3), dtype=np.int64)  # [truth, likeliest]
        self._policy = np.zeros((3, 3), dtype=np.int64)  # [best outcome of a move, outcome of the likeliest]
        self._plies = np.zeros(2)  # sum of errors, and of how many positions
        self._wrong = {"value": _Worst(), "policy": _Worst()}

    def add(self, model: torch.nn.Module, batch: Batch) -> Loss:
        outputs = outputs_of(model, batch)
        self.judge(outputs, batch)
        return loss_of(outputs, batch, self._weights)

    def judge(self, outputs: Outputs, batch: Batch) -> None:
        """Count what is right and wrong, and keep the worst."""
        value, policy = (_array(logits.float().softmax(dim=1)) for logits in outputs[:2])
        rows = {name: _array(tensor) for name, tensor in batch.items()}
        every = np.arange(len(value))
        truth, said = rows["value"], value.argmax(axis=1)
        np.add.at(self._value, (truth, said), 1)

        outcomes = rows["outcomes"]
        likeliest = policy.argmax(axis=1)
        reached = outcomes[every, likeliest]
        best = np.where(outcomes == _NO_MOVE, 0, outcomes).max(axis=1)
        told = reached != _NO_MOVE  # imported positions do not say what moves lead to
        np.add.at(self._policy, (best[told], reached[told]), 1)

        decided = _array(_distance_known(batch))
        plies = np.abs(_array(outputs.moves_left.float()) * PLIES - np.abs(rows["dtz"]))
        self._plies += [float(plies[decided].sum(dtype=np.float64)), int(decided.sum())]

        common = {"squares": rows["squares"], "en_passant": rows["en_passant"]}
        move = rows["moves"][every, likeliest]
        self._wrong["value"].keep(
            said != truth,
            value[every, said],
            {**common, "truth": truth, "said": said, "move": np.full_like(move, -1)},
        )
        self._wrong["policy"].keep(
            told & (reached != best),
            policy[every, likeliest],
            {**common, "truth": best, "said": reached, "move": move},
        )

    def state(self) -> dict[str, np.ndarray]:
        wrong = {f"{kind}/{name}": a for kind, worst in self._wrong.items() for name, a in worst.rows.items()}
        return {"value": self._value, "policy": self._policy, "plies": self._plies, **wrong}

    def merge(self, states: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._value, self._policy, self._plies = (
            np.sum([state[name] for state in states], axis=0) for name in ("value", "policy", "plies")
        )
        for kind, worst in self._wrong.items():
            worst.rows = {}
            for state in states:
                rows = {name.partition("/")[2]: a for name, a in state.items() if name.startswith(f"{kind}/")}
                if rows:
                    worst.add(rows)

    def values(self) -> dict[str, float]:
        total = int(self._value.sum())
        if not total:
            return {}
        figures = {"value_accuracy": int(np.trace(self._value)) / total}
        moves = int(self._policy.sum())
        if moves:
            figures["policy_accuracy"] = int(np.trace(self._policy)) / moves
        if self._plies[1]:
            figures["moves_left_error"] = float(self._plies[0] / self._plies[1])
        return figures

    def listings(self) -> tuple[Listing, ...]:
        return (
            Listing(name="value", rows=_confusion(self._value, "truth")),
            Listing(name="policy", rows=_confusion(self._policy, "best move")),
            *(
                Listing(
                    name=f"worst of the {kind}", rows=tuple(_described(error) for error in worst.errors())
                )
                for kind, worst in self._wrong.items()
            ),
        )

    def picture(self) -> bytes | None:
        """A PNG of the worst errors, or None where there is none."""
        errors = [error for worst in self._wrong.values() for error in worst.errors()]
        return draw([_shown(error) for error in errors]) if errors else None


class _Worst:
    """The LISTED rows with the highest "sure", by name of their columns, each position once."""

    def __init__(self) -> None:
        self.rows: dict[str, npt.NDArray[Any]] = {}

    def keep(
        self, wrong: npt.NDArray[np.bool_], sure: npt.NDArray[Any], columns: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        if wrong.any():
            self.add({"sure": sure[wrong], **{name: column[wrong] for name, column in columns.items()}})

    def add(self, rows: Mapping[str, npt.NDArray[Any]]) -> None:
        merged = {n: np.concatenate([self.rows[n], a]) if self.rows else a for n, a in rows.items()}
        kept: dict[bytes, int] = {}  # by position: of many random ones some come twice
        for row in np.argsort(-merged["sure"], kind="stable").tolist():
            kept.setdefault(merged["squares"][row].tobytes(), row)
            if len(kept) == LISTED:
                break
        order = list(kept.values())
        self.rows = {name: column[order] for name, column in merged.items()}

    def errors(self) -> list[dict[str, Any]]:
        """One row each, the worst first; "fen" names the position."""
        if not self.rows:
            return []
        fens = to_fen(self.rows["squares"], self.rows["en_passant"])
        count = len(fens)
        return [{name: a[i] for name, a in self.rows.items()} | {"fen": fens[i]} for i in range(count)]


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def _confusion(table: npt.NDArray[np.int64], of: str) -> tuple[dict[str, str | int | float], ...]:
    return tuple(
        {of: name, **{said: int(n) for said, n in zip(OUTCOMES, row, strict=True)}}
        for name, row in zip(OUTCOMES, table, strict=True)
    )


def _described(error: Mapping[str, Any]) -> dict[str, str | int | float]:
    move = {} if error["move"] < 0 else {"move": move_name(int(error["move"]))}
    return {
        "fen": error["fen"],
        **move,
        "truth": OUTCOMES[error["truth"]],
        "model": OUTCOMES[error["said"]],
        "sure": round(float(error["sure"]), 4),
    }


def _shown(error: Mapping[str, Any]) -> Shown:
    truth, said, move = OUTCOMES[error["truth"]], OUTCOMES[error["said"]], int(error["move"])
    if move < 0:
        return Shown(
            squares=error["squares"],
            fen=error["fen"],
            title=f"truth {truth}, model {said} ({error['sure']:.0%})",
        )
    return Shown(
        squares=error["squares"],
        fen=error["fen"],
        title=f"{truth}, but {move_name(move)} leads to {said} ({error['sure']:.0%})",
        move=(move % 64, move // 64 % 64),
    )


def move_name(move: int) -> str:
    """As engines write it, in the mover's view: e2e4, e7e8q."""
    squares = "".join(
        "abcdefgh"[square % 8] + str(square // 8 + 1) for square in (move % 64, move // 64 % 64)
    )
    return squares + ("", "n", "b", "r", "q")[move // 4096]
