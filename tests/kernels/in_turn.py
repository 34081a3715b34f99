"""Some pairs of all that there are: each case with every variant in turn, the rest exhaustively."""

from collections.abc import Sequence
from typing import Any

import pytest


def in_turn(cases: Sequence[Any], variants: Sequence[Any], by_default: int = 1) -> list[Any]:
    """Pairs of a case and a variant: one of a case in the fast suite, `by_default` in the default one."""
    pairs = []
    for number, case in enumerate(cases):
        for place in range(len(variants)):
            marks = [] if place == 0 else [pytest.mark.slow] if place < by_default else [pytest.mark.exhaustive]
            pairs.append(pytest.param(case, variants[(number + place) % len(variants)], marks=marks))
    return pairs
