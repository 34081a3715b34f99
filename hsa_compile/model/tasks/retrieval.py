"""The retrieval tasks of the papers: needles at chosen or random depths, the question at the end.

`s-niah` has one needle; `mk-niah` four, one asked; `mq-niah` six, two asked; `vt` two chains of three. The authors'
protocol is teacher-forced: an answer counts if every byte of it is the most likely one (`TaskSample.is_answered_by`).
A sample depends on its arguments alone. The wording is in `facts.py`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.tasks.haystack import Haystack
from hsa_compile.model.tasks.sample import (
    NEEDLE_BYTES,
    ByteArray,
    Edit,
    Facts,
    TaskPlan,
    TaskSample,
    chain_facts,
    draw_keys,
    lookup_facts,
)


def place(rng: random.Random, count: int, size: int, space: int, *, fixed: int | None = None) -> list[int]:
    """Draws starts of `count` intervals of `size` in `[0, space)`, in random order; every arrangement can come.

    Args:
        rng: the source of randomness.
        count: how many intervals there are, 1 or more.
        size: the size of each.
        space: the size of what holds them all.
        fixed: the first of the starts that are returned; None if it is random too.

    Raises:
        InvalidArgument: the intervals do not fit.
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
    """Draws ascending starts in `[begin, end)`: the gaps are drawn, and the intervals pushed between them."""
    slack = end - begin - count * size
    if slack < 0:
        raise InvalidArgument(f"{count} needles of {size} bytes do not fit in {max(end - begin, 0)} bytes")
    gaps = sorted(int(rng.random() * (slack + 1)) for _ in range(count))
    return [begin + gap + number * size for number, gap in enumerate(gaps)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How many needles a task hides and how many it asks for, if nobody says otherwise."""

    num_needles: int
    num_queries: int
    has_chains: bool = False


TASKS = {
    "s-niah": Task(num_needles=1, num_queries=1),
    "mk-niah": Task(num_needles=4, num_queries=1),
    "mq-niah": Task(num_needles=6, num_queries=2),
    "vt": Task(num_needles=6, num_queries=1, has_chains=True),
}


def make_sample(
    task: str,
    *,
    length: int,
    seed: int,
    index: int,
    haystack: Haystack,
    depth: float | None = None,
    num_needles: int | None = None,
    num_queries: int | None = None,
    min_distance: int = 0,
) -> TaskSample:
    """Makes one sample of exactly `length` bytes.

    Args:
        task: one of `TASKS`.
        length: the length in bytes, with needles, question and answers.
        seed: together with `index` the seed of everything that is random.
        index: the number of the sample.
        haystack: what the needles are hidden in; they replace its bytes.
        depth: where the first asked needle lies, 0 to 1; random if None.
        num_needles: how many needles; the task's own number if None. `vt` needs a multiple of 3.
        num_queries: how many of them are asked for; the task's own number if None.
        min_distance: more than so many bytes lie between any needle and the question.

    Raises:
        InvalidArgument: there is no such task, or the needles do not fit.
    """
    rng = _rng(task, length, seed, index, depth)
    base = haystack.fill(length, rng)
    plan = _plan(task, base, rng, depth, num_needles, num_queries, min_distance)
    return plan.apply(base)


def make_edits(
    task: str,
    *,
    length: int,
    seed: int,
    haystack: Haystack,
    depths: Sequence[float | None],
    num_needles: int | None = None,
    num_queries: int | None = None,
    min_distance: int = 0,
) -> tuple[ByteArray, tuple[TaskPlan, ...]]:
    """Makes one haystack, and several samples that differ from it in their needles and their question only.

    A model that has read a very long haystack once can read again only what an edit touches. The arguments are those
    of `make_sample`.

    Args:
        depths: there is one sample for each.

    Returns:
        the haystack, `[length]` of uint8, and for each sample its edits and answers; `plan.apply(haystack)` is the
        sample as a whole.
    """
    base = haystack.fill(length, random.Random(f"{task} {seed} base {length}"))
    plans = tuple(
        _plan(task, base, _rng(task, length, seed, index, depth), depth, num_needles, num_queries, min_distance)
        for index, depth in enumerate(depths)
    )
    return np.frombuffer(base, np.uint8), plans


def position(facts: Facts, rng: random.Random, space: int, fixed: int | None = None) -> list[int]:
    """Draws where each needle begins in `[0, space)`; the order within a chain is that of the text.

    Args:
        facts: the facts whose needles are placed.
        rng: the source of randomness.
        space: the size of what holds them all.
        fixed: the start of the first asked needle, or of one of the first chain; None if it is random too.
    """
    starts = place(rng, len(facts.needles), NEEDLE_BYTES, space, fixed=fixed)
    return in_order(starts, facts.num_chains, rng) if facts.num_chains else starts


def _rng(task: str, length: int, seed: int, index: int, depth: float | None) -> random.Random:
    """Seeds by depth too: names and values differ between depths, so that cells of a table are independent."""
    return random.Random(f"{task} {seed} {index} {length} {depth}")


def _plan(
    task: str,
    base: bytearray,
    rng: random.Random,
    depth: float | None,
    num_needles: int | None,
    num_queries: int | None,
    min_distance: int,
) -> TaskPlan:
    if task not in TASKS:
        raise InvalidArgument(f"task {task!r}; allowed are {', '.join(TASKS)}")
    if depth is not None and not 0 <= depth <= 1:
        raise InvalidArgument(f"depth {depth}; allowed is 0, the beginning, to 1, the end")
    kind = TASKS[task]
    keys = draw_keys(rng, kind.num_needles if num_needles is None else num_needles, base)
    queries = kind.num_queries if num_queries is None else num_queries
    facts = (chain_facts if kind.has_chains else lookup_facts)(rng, keys, queries)
    question_start = len(base) - len(facts.question)
    space = question_start - min_distance - 1
    last = space - NEEDLE_BYTES
    if last < 0 or min_distance < 0:
        raise InvalidArgument(
            f"length {len(base)} with distance {min_distance}; a needle, the distance and the question need "
            f"{NEEDLE_BYTES + max(min_distance, 0) + 1 + len(facts.question)}"
        )
    fixed = None if depth is None else round(depth * last)
    starts = position(facts, rng, space, fixed)
    return TaskPlan(
        task=task,
        length=len(base),
        needles=tuple(Edit(start=start, text=text) for start, text in zip(starts, facts.needles, strict=True)),
        asked=facts.asked,
        question=Edit(start=question_start, text=facts.question),
        answer_spans=tuple((question_start + start, question_start + end) for start, end in facts.answer_spans),
        depth=(starts[0] if fixed is None else fixed) / last if last else 0.0,
    )
