"""Wilson's interval against published values and what it must hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsa_compile.model.evaluation.cells import wilson_interval


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"),
    # Newcombe (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_values(correct: int, samples: int, low: float, high: float) -> None:
    assert wilson_interval(correct, samples) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_it_holds_the_share_and_mirrors(pair: tuple[int, int]) -> None:
    correct, samples = pair
    low, high = wilson_interval(correct, samples)
    assert 0 <= low <= correct / samples <= high <= 1
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(samples - correct, samples))
