"""Which pieces stand on the board: specifications such as "KPkp:3,KRkp", and the tables that hold their truth.

Upper case is White, lower case Black, in any order; a weight after a colon says how often an ending is drawn
against the others of the list (1 where none is given).

Colours are names only: positions are seen from the side to move (boards.py), and either side may be it. KRkp
(White has the rook, Black the pawn) and its colour-reversed twin KPkr are therefore one ending, whose records
are half "mover has the rook", half "mover has the pawn", whichever way it is written; a list that names both
adds their weights.

A side's pieces are written strongest first (KQRBNP), as in Syzygy's file names, where the side with more pieces,
else with the stronger ones, comes first: KRvKP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from manyhands.errors import DataError

STRENGTH = "KQRBNP"
MOST_MEN = 7
"""Of Syzygy's tables."""

_MOST_MOVES = {"K": 8, "Q": 27, "R": 14, "B": 13, "N": 8}
_EXAMPLE = "a specification reads like KPkp, KRkp:2 or KPkp,KRkp (upper case White, lower case Black)"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The pieces of both sides, canonical: each strongest first, the stronger side first."""

    strong: str
    weak: str

    @property
    def table(self) -> str:
        """The name of its tables, for example KRvKP."""
        return f"{self.strong}v{self.weak}"

    @property
    def men(self) -> int:
        return len(self.strong) + len(self.weak)

    @property
    def sides(self) -> tuple[tuple[str, str], ...]:
        """The views that a mover may have: (the mover's pieces, the opponent's); one where both are alike."""
        both = ((self.strong, self.weak), (self.weak, self.strong))
        return both[:1] if self.strong == self.weak else both


@dataclass(frozen=True, kw_only=True)
class Specification:
    """Endings and how often each is drawn: weights sum to 1. `moves` bounds the legal moves of any position."""

    endings: tuple[Ending, ...]
    weights: tuple[float, ...]

    @property
    def text(self) -> str:
        """Canonical: equal for specifications that mean the same."""
        names = [e.strong + e.weak.lower() for e in self.endings]
        if len(set(self.weights)) == 1:
            return ",".join(names)
        return ",".join(
            f"{name}:{weight / min(self.weights):.6g}"
            for name, weight in zip(names, self.weights, strict=True)
        )

    @property
    def moves(self) -> int:
        return max(most_moves(own, other) for ending in self.endings for own, other in ending.sides)


def ending(first: str, second: str) -> Ending:
    """The ending of two sides' pieces (letters of KQRBNP in any order, one king each)."""
    one, two = _ordered(first), _ordered(second)
    strong, weak = (one, two) if _strength(one) >= _strength(two) else (two, one)
    return Ending(strong=strong, weak=weak)


def parse(text: str) -> Specification:
    """The specification of a comma list. Raises DataError for one that is impossible, saying why."""
    weights: dict[Ending, float] = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        pieces = _parse_ending(name, text)
        weights[pieces] = weights.get(pieces, 0.0) + (_parse_weight(weight, text) if colon else 1.0)
    total = sum(weights.values())
    ordered = sorted(weights, key=lambda e: (e.men, e.table))
    return Specification(endings=tuple(ordered), weights=tuple(weights[e] / total for e in ordered))


def most_moves(own: str, other: str) -> int:
    """No position has more legal moves for the owner of `own`: each piece on an empty board, each pawn promoting."""
    captures = min(2, len(other) - 1)
    return sum(4 * (1 + captures) if piece == "P" else _MOST_MOVES[piece] for piece in own)


def zeroed(start: Ending) -> Iterator[Ending]:
    """The endings that one capture, promotion, or both, lead to."""
    for own, other in ((start.strong, start.weak), (start.weak, start.strong)):
        left = {other, *(_without(other, piece) for piece in set(other) - {"K"})}
        mine = {own}
        if "P" in own:
            mine |= {_without(own, "P") + piece for piece in "QRBN"}
        for rest in left:
            yield from (ending(side, rest) for side in mine if (side, rest) != (own, other))


@lru_cache(maxsize=256)
def reachable(start: Ending) -> frozenset[Ending]:
    """`start` and all endings that captures and promotions lead to from it, two kings alone included."""
    found, fresh = {start}, [start]
    while fresh:
        for after in zeroed(fresh.pop()):
            if after not in found:
                found.add(after)
                fresh.append(after)
    return frozenset(found)


def needed_tables(start: Ending) -> tuple[str, ...]:
    """Names of the files that label its positions: values (.rtbw) of all that is reachable, distances (.rtbz)
    of the ending itself (a capture or pawn move starts the count anew, so none of what follows one)."""
    values = {f"{e.table}.rtbw" for e in reachable(start) if e.men > 2}
    return (*sorted(values), f"{start.table}.rtbz")


def check_tables(endings: tuple[Ending, ...], directory: Path) -> None:
    """Raises DataError that names each file missing in `directory`."""
    if not directory.is_dir():
        raise DataError(
            f"the directory of Syzygy tables {directory} is not there. Name the one with the .rtbw and .rtbz files."
        )
    needed = {name for one in endings for name in needed_tables(one)}
    missing = sorted(name for name in needed if not (directory / name).is_file())
    if missing:
        names = ",".join(e.strong + e.weak.lower() for e in endings)
        raise DataError(
            f"{names} needs {len(needed)} Syzygy files, of which {len(missing)} are missing in {directory}: "
            f"{', '.join(missing)}. Any mirror of the Syzygy tables has them: put them into that directory."
        )


def _parse_ending(name: str, text: str) -> Ending:
    where = f"piece specification '{text}'"
    unknown = sorted({letter for letter in name if letter.upper() not in STRENGTH})
    if unknown:
        raise DataError(f"{where}: '{unknown[0]}' is no piece; expected letters of {STRENGTH}; {_EXAMPLE}.")
    white = "".join(letter for letter in name if letter.isupper())
    black = "".join(letter.upper() for letter in name if letter.islower())
    for colour, side in (("White", white), ("Black", black)):
        if side.count("K") != 1:
            raise DataError(
                f"{where}: {colour} has {side.count('K')} kings in '{name}'; expected one each; {_EXAMPLE}."
            )
    if len(name) == 2:
        raise DataError(f"{where}: two kings alone are always a draw; expected another piece; {_EXAMPLE}.")
    if len(name) > MOST_MEN:
        raise DataError(
            f"{where}: '{name}' has {len(name)} pieces; there are Syzygy tables for up to {MOST_MEN}, kings included."
        )
    return ending(white, black)


def _parse_weight(weight: str, text: str) -> float:
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise DataError(
            f"piece specification '{text}': the weight '{weight}' is not a number above 0; {_EXAMPLE}."
        )
    return value


def _ordered(side: str) -> str:
    return "".join(sorted(side, key=STRENGTH.index))


def _strength(side: str) -> tuple[int, list[int]]:
    return len(side), [-STRENGTH.index(piece) for piece in side]


def _without(side: str, piece: str) -> str:
    return side.replace(piece, "", 1)
