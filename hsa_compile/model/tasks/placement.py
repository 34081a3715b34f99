"""Where needles lie: at random places that do not overlap, one of them at a chosen depth if one was chosen."""

import random

from hsa_compile.errors import InvalidArgument


def place(rng: random.Random, count: int, size: int, space: int, *, fixed: int | None = None) -> list[int]:
    """Starts of `count` intervals of `size` in `[0, space)`, in random order; every arrangement can come.

    Args:
        rng: decides.
        count: of intervals, 1 or more.
        size: of each.
        space: that holds them all.
        fixed: start of the first one returned; None if it is random too.

    Raises:
        InvalidArgument: they do not fit.
    """
    if fixed is None:
        starts = _spread(rng, count, size, 0, space)
        rng.shuffle(starts)
        return starts
    left, right = fixed, space - fixed - size
    others = count - 1
    least, most = max(0, others - right // size), min(others, left // size)
    if left < 0 or right < 0 or least > most:
        raise InvalidArgument(f"{count} needles of {size} bytes with one at {fixed} do not fit in {space} bytes")
    share = left / (left + right) if others else 0.0
    on_the_left = min(max(sum(rng.random() < share for _ in range(others)), least), most)
    starts = _spread(rng, on_the_left, size, 0, left)
    starts += _spread(rng, others - on_the_left, size, fixed + size, space)
    rng.shuffle(starts)
    return [fixed, *starts]


def in_order(starts: list[int], num_chains: int, rng: random.Random) -> list[int]:
    """Gives the places to chains, each in the order of the text, the first place to the first chain.

    Returns:
        the same starts: those of the first chain, then of the second, …, each ascending.
    """
    length = len(starts) // num_chains
    rest = starts[1:]
    rng.shuffle(rest)
    given = [starts[0], *rest]
    return [start for chain in range(num_chains) for start in sorted(given[chain * length : (chain + 1) * length])]


def _spread(rng: random.Random, count: int, size: int, begin: int, end: int) -> list[int]:
    """Ascending starts in `[begin, end)`: the gaps are drawn, and the intervals pushed between them."""
    slack = end - begin - count * size
    if slack < 0:
        raise InvalidArgument(f"{count} needles of {size} bytes do not fit in {max(end - begin, 0)} bytes")
    gaps = sorted(int(rng.random() * (slack + 1)) for _ in range(count))
    return [begin + gap + number * size for number, gap in enumerate(gaps)]
