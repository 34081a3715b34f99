"""Places of needles."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.tasks.retrieval import in_order, place


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 12), st.integers(0, 120), st.data())
def test_intervals_lie_inside_and_apart(seed: int, count: int, size: int, slack: int, data: st.DataObject) -> None:
    space = count * size + slack
    fixed = data.draw(st.none() | st.integers(0, space - size))
    try:
        starts = place(random.Random(seed), count, size, space, fixed=fixed)
    except InvalidArgument:
        assert fixed is not None  # a hole may leave two halves of an interval
        assert fixed // size + (space - fixed - size) // size < count - 1
        return
    assert len(starts) == count
    assert fixed is None or starts[0] == fixed
    taken = sorted(starts)
    assert taken[0] >= 0
    assert taken[-1] + size <= space
    assert all(b - a >= size for a, b in itertools.pairwise(taken))


def test_every_arrangement_can_come() -> None:
    rng = random.Random(0)
    assert {tuple(place(rng, 2, 2, 5)) for _ in range(200)} == {(0, 2), (0, 3), (1, 3), (2, 0), (3, 0), (3, 1)}
    assert {tuple(place(rng, 2, 2, 7, fixed=3)) for _ in range(200)} == {(3, 0), (3, 1), (3, 5)}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="3 needles of 4 tokens do not fit in 11"):
        place(random.Random(0), 3, 4, 11)
    with pytest.raises(InvalidArgument, match="with one at 3 do not fit in 10"):
        place(random.Random(0), 2, 4, 10, fixed=3)


@given(st.permutations(range(9)), st.integers(0, 100))
def test_chains_keep_all_places_and_the_first_place_stays_with_the_first_chain(starts: list[int], seed: int) -> None:
    given_ = in_order(list(starts), 3, random.Random(seed))
    assert sorted(given_) == list(range(9))
    assert starts[0] in given_[:3]
    assert all(given_[begin : begin + 3] == sorted(given_[begin : begin + 3]) for begin in (0, 3, 6))
