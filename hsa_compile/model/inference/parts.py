"""Which part of new text each of several processes reads, where their memory of it is shared: places, and no tensors.

The lower half's output at a token depends on no more than `lower_reach` tokens before it. So a process that sets in
that much before its part, with empty caches, is exact within it, and waits for no other process. The end of the text,
which the upper half reads, all processes read alike, and set in as early there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hsa_compile.model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where reading sets in, for each row.

    Attributes:
        positions: where it stands in the layers.
        text: how many of the new tokens come before.
        origins: where the caches of the lower half begin: they are empty at a start that is not the text's.
    """

    positions: list[int]
    text: list[int]
    origins: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What one process reads of the new tokens of each row.

    Attributes:
        early: where it sets in to read its part.
        first, last: its part, as numbers of new tokens; it begins and ends at chunks, and may be empty.
        end: where it sets in to read the end, as all processes do.
        num_chunks: how many chunks each process completes, for each row.
    """

    early: Start
    first: list[int]
    last: list[int]
    end: Start
    num_chunks: list[list[int]]


def share_text(
    config: ModelConfig, positions: Sequence[int], num_new: Sequence[int], part: int, num_parts: int, tail: int
) -> Parts | None:
    """Gives each process a part of new text; None where that would be more to read for each than all of it.

    Args:
        config: the config of a model whose layers are all windows.
        positions: where each row stands.
        num_new: how many tokens are new in each row.
        part: the number of this process.
        num_parts: how many processes there are.
        tail: how many of the newest outputs of the lower half all processes need.
    """
    C, reach = config.chunk_size, config.lower_reach
    end_length = end_read(config, tail)
    if -(-max(num_new) // num_parts) + reach + end_length >= max(num_new):
        return None
    ends = [config.layer_position(config.text_length(p) + n) for p, n in zip(positions, num_new, strict=True)]
    bounds = [_even(p // C, end // C, num_parts) for p, end in zip(positions, ends, strict=True)]
    first = [max(p, row[part] * C) for p, row in zip(positions, bounds, strict=True)]
    last = [max(p, row[part + 1] * C) for p, row in zip(positions, bounds, strict=True)]
    return Parts(
        early=_start(config, positions, [place - reach for place in first]),
        first=_text(config, positions, first),
        last=_text(config, positions, last),
        end=_start(config, positions, [end - end_length for end in ends]),
        num_chunks=[[after - before for before, after in pairwise(row)] for row in bounds],
    )


def end_read(config: ModelConfig, tail: int) -> int:
    """Returns how many of the newest tokens the lower half reads to be exact in `tail`, and in a chunk's beginning."""
    return max(tail, config.chunk_size - 1) + config.lower_reach


def _start(config: ModelConfig, positions: Sequence[int], places: Sequence[int]) -> Start:
    """Sets in at places or before, at a chunk; at the row's own position where they lie before that."""
    C = config.chunk_size
    found = [max(p, place // C * C) for p, place in zip(positions, places, strict=True)]
    origins = [0 if place == p else place for p, place in zip(positions, found, strict=True)]
    return Start(positions=found, text=_text(config, positions, found), origins=origins)


def _text(config: ModelConfig, positions: Sequence[int], places: Sequence[int]) -> list[int]:
    """Returns how many tokens of text lie between the rows' positions and places."""
    return [config.text_length(place) - config.text_length(p) for p, place in zip(positions, places, strict=True)]


def _even(first: int, last: int, num_parts: int) -> list[int]:
    """Returns the bounds of parts of `first … last − 1` that are as even as can be."""
    return [first + (last - first) * part // num_parts for part in range(num_parts + 1)]
