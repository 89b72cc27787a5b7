"""Who has which samples: ranges of each epoch's permutation, from free to counted and back.

The books are a tuple of ledgers, one per epoch, oldest first; the last one is the open epoch, and earlier ones
stay until all of theirs is counted. In each of them, at every step,

    free + assigned + pending + counted = total.

Work takes from the oldest epoch that has something free, so what was given back is done before anything new;
the next epoch opens only when nothing is free anywhere, and one assignment may straddle the boundary. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from manyhands.coordination.state import DataLedger
from manyhands.coordination.types import AssignmentId, IndexRange

Books = tuple[DataLedger, ...]


def open_epoch(total: int, epoch: int) -> DataLedger:
    return DataLedger(total=total, epoch=epoch, free=(IndexRange(epoch=epoch, start=0, stop=total),))


def size(ranges: Iterable[IndexRange]) -> int:
    return sum(len(part) for part in ranges)


def balance(ledger: DataLedger) -> dict[str, int]:
    """Samples by place; free + assigned + pending + counted is `ledger.total`."""
    return {
        "free": size(ledger.free),
        "assigned": sum(size(parts) for parts in ledger.assigned.values()),
        "pending": sum(size(parts) for parts in ledger.pending.values()),
        "counted": ledger.counted,
    }


def take(books: Books, assignment: AssignmentId, samples: int) -> tuple[Books, tuple[IndexRange, ...]]:
    """Move `samples` samples from free to assigned; opens epochs as needed. Returns the ranges, oldest first."""
    ledgers = list(books)
    taken: list[IndexRange] = []
    missing = samples
    at = 0
    while missing > 0:
        if at == len(ledgers):
            ledgers.append(open_epoch(ledgers[-1].total, ledgers[-1].epoch + 1))
        got, free = _cut(ledgers[at].free, missing)
        if got:
            assigned = {**ledgers[at].assigned, assignment: got}
            ledgers[at] = dataclasses.replace(ledgers[at], free=free, assigned=assigned)
            taken += got
            missing -= size(got)
        at += 1
    return tuple(ledgers), tuple(taken)


def hand_in(books: Books, assignment: AssignmentId) -> Books:
    """From assigned to pending: the update is here, the closing is not."""
    return tuple(_hand_in(ledger, assignment) for ledger in books)


def give_back(books: Books, assignment: AssignmentId) -> Books:
    """From assigned or pending to free: lost, failed, refused or too late."""
    return tuple(_give_back(ledger, assignment) for ledger in books)


def count(books: Books, assignment: AssignmentId) -> Books:
    """From pending to counted. Epochs that are done with are dropped, the open one excepted."""
    counted = [_count(ledger, assignment) for ledger in books]
    return (*(ledger for ledger in counted[:-1] if ledger.counted < ledger.total), counted[-1])


def _cut(free: tuple[IndexRange, ...], most: int) -> tuple[tuple[IndexRange, ...], tuple[IndexRange, ...]]:
    got: list[IndexRange] = []
    for index, part in enumerate(free):
        if len(part) > most:
            if most:
                got.append(IndexRange(epoch=part.epoch, start=part.start, stop=part.start + most))
            rest = IndexRange(epoch=part.epoch, start=part.start + most, stop=part.stop)
            return tuple(got), (rest, *free[index + 1 :])
        got.append(part)
        most -= len(part)
    return tuple(got), ()


def _hand_in(ledger: DataLedger, assignment: AssignmentId) -> DataLedger:
    if assignment not in ledger.assigned:
        return ledger
    assigned = dict(ledger.assigned)
    ranges = assigned.pop(assignment)
    return dataclasses.replace(ledger, assigned=assigned, pending={**ledger.pending, assignment: ranges})


def _give_back(ledger: DataLedger, assignment: AssignmentId) -> DataLedger:
    if assignment not in ledger.assigned and assignment not in ledger.pending:
        return ledger
    assigned, pending = dict(ledger.assigned), dict(ledger.pending)
    ranges = (*assigned.pop(assignment, ()), *pending.pop(assignment, ()))
    return dataclasses.replace(ledger, free=_joined(ledger.free, ranges), assigned=assigned, pending=pending)


def _count(ledger: DataLedger, assignment: AssignmentId) -> DataLedger:
    if assignment not in ledger.pending:
        return ledger
    pending = dict(ledger.pending)
    ranges = pending.pop(assignment)
    return dataclasses.replace(ledger, pending=pending, counted=ledger.counted + size(ranges))


def _joined(free: tuple[IndexRange, ...], ranges: tuple[IndexRange, ...]) -> tuple[IndexRange, ...]:
    """Sorted, and neighbours made one."""
    joined: list[IndexRange] = []
    for part in sorted((*free, *ranges), key=lambda part: part.start):
        if joined and joined[-1].stop == part.start:
            part = IndexRange(epoch=part.epoch, start=joined.pop().start, stop=part.stop)
        joined.append(part)
    return tuple(joined)
