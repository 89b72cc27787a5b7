"""Truth of many positions with the same pieces, read from the arrays of endings.

A legal move's distance to zero for the mover is what the record's outcomes and best moves are made of: it is read
from the position after the move. A capture or pawn move zeroes the count, so that only its value matters; any other
move leads to the same ending's distances.
"""

from __future__ import annotations

import numpy as np

from manyhands.tasks.chess_endgames.children import (
    MATED,
    Arrays,
    Followed,
    dense_index,
    follow,
    with_en_passant,
)
from manyhands.tasks.chess_endgames.distances import Int64s, Labels, before_zeroing
from manyhands.tasks.chess_endgames.moves import Men, legal_moves


def label(men: Men, arrays: Arrays) -> Labels:
    """Of legal positions."""
    place = dense_index(men)
    moves = legal_moves(men)
    distance = np.zeros(len(moves.row), dtype=np.int64)
    for followed in follow(men, moves):
        distance[followed.chosen] = _distance(followed, arrays)
    return Labels(
        wdl=arrays.values(men.own, men.other)[place].astype(np.int64),
        dtz=arrays.distances(men.own, men.other)[place].astype(np.int64),
        row=moves.row,
        number=moves.number,
        distance=distance,
    )


def _distance(followed: Followed, arrays: Arrays) -> Int64s:
    after, place = followed.after, dense_index(followed.after)
    if followed.zeroing:
        reply = arrays.values(after.own, after.other)[place].astype(np.int64)
        if followed.pawn is not None and followed.same_pieces:
            two = np.flatnonzero(followed.step == 16)
            reply[two] = with_en_passant(after.rows(two), followed.pawn, reply[two], arrays.values)
        return before_zeroing(-reply)
    reply = arrays.distances(after.own, after.other)[place].astype(np.int64)
    return np.where(reply == MATED, 1, -reply - np.sign(reply))
