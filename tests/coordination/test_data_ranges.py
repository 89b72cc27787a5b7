from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.coordination import data_ranges
from manyhands.coordination.data_ranges import Books, balance, open_epoch
from manyhands.coordination.types import IndexRange


def test_work_takes_from_the_front_and_counts_at_the_end() -> None:
    books, ranges = data_ranges.take((open_epoch(10, 0),), "a", 4)
    assert ranges == (IndexRange(epoch=0, start=0, stop=4),)
    books = data_ranges.count(data_ranges.hand_in(books, "a"), "a")
    assert balance(books[-1]) == {"free": 6, "assigned": 0, "pending": 0, "counted": 4}


def test_what_is_given_back_is_done_before_anything_new() -> None:
    books, first = data_ranges.take((open_epoch(10, 0),), "a", 4)
    books, _ = data_ranges.take(books, "b", 4)
    books, again = data_ranges.take(data_ranges.give_back(books, "a"), "c", 5)
    assert again == (*first, IndexRange(epoch=0, start=8, stop=9))


def test_an_assignment_straddles_epochs_and_the_old_one_is_finished_first() -> None:
    books, _ = data_ranges.take((open_epoch(10, 0),), "a", 8)
    books, ranges = data_ranges.take(books, "b", 5)
    assert ranges == (IndexRange(epoch=0, start=8, stop=10), IndexRange(epoch=1, start=0, stop=3))
    assert [ledger.epoch for ledger in books] == [0, 1]
    books, ranges = data_ranges.take(data_ranges.give_back(books, "a"), "c", 9)
    assert ranges == (IndexRange(epoch=0, start=0, stop=8), IndexRange(epoch=1, start=3, stop=4))
    for identifier in "bc":
        books = data_ranges.count(data_ranges.hand_in(books, identifier), identifier)
    assert [ledger.epoch for ledger in books] == [1], "an epoch that is all counted is done with"


def test_an_epoch_smaller_than_one_piece_of_work() -> None:
    books, ranges = data_ranges.take((open_epoch(3, 0),), "a", 8)
    assert [(part.epoch, len(part)) for part in ranges] == [(0, 3), (1, 3), (2, 2)]
    books = data_ranges.count(data_ranges.hand_in(books, "a"), "a")
    assert [ledger.epoch for ledger in books] == [2]


def test_the_open_epoch_stays_even_when_all_is_counted() -> None:
    books, _ = data_ranges.take((open_epoch(4, 0),), "a", 4)
    books = data_ranges.count(data_ranges.hand_in(books, "a"), "a")
    assert [ledger.epoch for ledger in books] == [0]
    assert data_ranges.take(books, "b", 1)[1] == (IndexRange(epoch=1, start=0, stop=1),)


def test_unknown_work_changes_nothing() -> None:
    books: Books = (open_epoch(4, 0),)
    assert data_ranges.hand_in(books, "x") == books
    assert data_ranges.give_back(books, "x") == books
    assert data_ranges.count(books, "x") == books


actions = st.lists(
    st.tuples(
        st.sampled_from(["take", "hand_in", "give_back", "count"]), st.integers(0, 6), st.integers(1, 25)
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(actions, st.integers(1, 30))
def test_every_sample_is_in_one_place(steps: list[tuple[str, int, int]], total: int) -> None:
    books: Books = (open_epoch(total, 0),)
    made = 0
    counted: dict[int, list[int]] = {}
    for what, which, samples in steps:
        known = sorted({key for ledger in books for key in (*ledger.assigned, *ledger.pending)})
        name = known[which % len(known)] if known else "none"
        if what == "take":
            books, ranges = data_ranges.take(books, f"w{made}", samples)
            assert data_ranges.size(ranges) == samples
            made += 1
        elif what == "count":
            for ledger in books:
                for part in ledger.pending.get(name, ()):
                    counted.setdefault(ledger.epoch, []).extend(range(part.start, part.stop))
            books = data_ranges.count(books, name)
        else:
            books = getattr(data_ranges, what)(books, name)
        for ledger in books:
            everywhere = list(counted.get(ledger.epoch, ()))
            places = (*ledger.free, *(p for part in ledger.assigned.values() for p in part))
            for part in (*places, *(p for parts in ledger.pending.values() for p in parts)):
                everywhere.extend(range(part.start, part.stop))
            assert sorted(everywhere) == list(range(ledger.total)), "each sample once"
            assert sum(balance(ledger).values()) == ledger.total
            assert list(ledger.free) == sorted(ledger.free, key=lambda part: part.start)
