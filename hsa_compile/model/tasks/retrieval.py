"""Samples of the tasks, at any length and depth: needles are placed, and the question stands at the end.

A sample depends on its arguments alone.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.tokenizer import BYTES, BytesTokenizer, TokenArray, Tokenizer
from hsa_compile.model.tasks.facts import END, Facts, Question
from hsa_compile.model.tasks.family import TASKS
from hsa_compile.model.tasks.haystack import FREQUENT, Haystack, grid_of
from hsa_compile.model.tasks.sample import Edit, TaskPlan, TaskSample

PHASES = 64  # needles of a cell begin at so many places, as many as the largest chunk in use has
_PHASE_STEP = 39  # 64 divided by the golden ratio: few samples already lie far apart, in smaller chunks too
_BYTES_PER_TOKEN = 6
_BLOCK_BYTES = 2**20  # how much text is encoded at once


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
        raise InvalidArgument(f"{count} needles of {size} tokens with one at {fixed} do not fit in {space}")
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
        raise InvalidArgument(f"{count} needles of {size} tokens do not fit in {max(end - begin, 0)}")
    gaps = sorted(int(rng.random() * (slack + 1)) for _ in range(count))
    return [begin + gap + number * size for number, gap in enumerate(gaps)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Which sample is meant among those in one haystack.

    Attributes:
        depth: where the asked needle lies, 0 to 1; random if None.
        index: the number of the sample.
    """

    depth: float | None = None
    index: int = 0


def make_sample(
    task: str,
    *,
    length: int,
    seed: int,
    index: int,
    haystack: Haystack,
    depth: float | None = None,
    min_distance: int = 0,
    tokenizer: Tokenizer | None = None,
) -> TaskSample:
    """Makes one sample of exactly `length` tokens; the arguments are those of `make_edits`."""
    base, (plan,) = make_edits(
        task, length=length, seed=seed, number=index, haystack=haystack,
        asked=[Asked(depth=depth, index=index)], min_distance=min_distance, tokenizer=tokenizer,
    )  # fmt: skip
    return plan.apply(base)


def make_edits(
    task: str,
    *,
    length: int,
    seed: int,
    haystack: Haystack,
    asked: Sequence[Asked],
    number: int = 0,
    min_distance: int = 0,
    tokenizer: Tokenizer | None = None,
) -> tuple[TokenArray, tuple[TaskPlan, ...]]:
    """Makes one haystack, and several samples that differ from it in their needles and their question only.

    A model that has read a very long haystack once can read again only what an edit touches. At a depth, needles begin
    at one of the `PHASES` places next to it: consecutive samples go over all of them, so that no depth stands for one
    place in a chunk. Among other needles they begin where those begin, and go over as many of these places as reach
    all offsets that there are.

    Args:
        task: one of `TASKS`.
        length: the length in tokens, with needles, question and answers.
        seed: the seed of everything that is random, together with what follows.
        haystack: what the needles are hidden in; they replace its tokens.
        asked: the samples.
        number: the number of the haystack.
        min_distance: more than so many tokens lie between any needle and the question.
        tokenizer: the tokenizer of the model; None for bytes.

    Returns:
        the haystack, `[length]`, and for each sample its edits and answers; `plan.apply(haystack)` is the sample.

    Raises:
        InvalidArgument: there is no such task, or the needles do not fit.
    """
    if task not in TASKS:
        raise InvalidArgument(f"task {task!r}; allowed are {', '.join(TASKS)}")
    tokens, text, grid = _filled(haystack, length, random.Random(f"{task} {seed} base {length} {number}"), tokenizer)
    encode = (tokenizer or BytesTokenizer()).encode
    plans = []
    for each in asked:
        if each.depth is not None and not 0 <= each.depth <= 1:
            raise InvalidArgument(f"depth {each.depth}; allowed is 0, the beginning, to 1, the end")
        # The depth is part of the seed: names and values differ between depths, so that cells are independent.
        rng = random.Random(f"{task} {seed} {each.index} {length} {each.depth}")
        facts = TASKS[task].make(rng, text)
        first_phase = random.Random(f"{task} {seed} phase {length} {each.depth}").randrange(PHASES)
        phase = (first_phase + _PHASE_STEP * each.index) % PHASES
        plans.append(_plan(task, facts, length, rng, each.depth, phase, min_distance, encode, grid))
    return tokens, tuple(plans)


def write_sample(
    task: str, text: bytearray, begin: int, end: int, rng: random.Random, *, grid: range, min_distance: int = 0
) -> tuple[tuple[int, int], ...]:
    """Writes a sample over a part of a text of bytes, and returns where its answers are; no name is one of the text's.

    Needles begin on the `grid` of the part, as `grid_of` has it.

    Raises:
        InvalidArgument: the part is too short.
    """
    whole = bytes(text[begin:end]) if TASKS[task].haystack == FREQUENT else bytes(text)
    facts = TASKS[task].make(rng, whole)
    plan = _plan(task, facts, end - begin, rng, None, 0, min_distance, BytesTokenizer().encode, grid)
    for edit in plan.edits:
        text[begin + edit.start : begin + edit.end] = bytes(edit.tokens)
    return tuple((begin + start, begin + stop) for start, stop in plan.answer_spans)


def from_place(grid: range, begin: int) -> range:
    """Returns the part of a grid from `begin` on, with places that count from there."""
    return range((grid.start - begin) % grid.step, max(grid.stop - begin, 0), grid.step)


def starts_in(grid: range, count: int, size: int, space: int) -> range:
    """Returns where `count` needles of a size may begin in `[0, space)`: on the grid, or anywhere if that is tight."""
    on_grid = range(grid.start, space - size + 1, grid.step)
    units = -(-size // grid.step)
    return on_grid if len(on_grid) - 1 >= count * units else range(space - size + 1)


def position(facts: Facts, rng: random.Random, size: int, allowed: range, fixed: int | None = None) -> list[int]:
    """Draws where each needle begins; the order within a chain is that of the text.

    Args:
        facts: the facts whose needles are placed.
        rng: the source of randomness.
        size: how much room a needle takes.
        allowed: where one may begin, as `starts_in` has it.
        fixed: the start of the first asked needle, or of one of the first chain, which is one of those that are
            allowed; None if it is random too.
    """
    units = -(-size // allowed.step)
    place_of_fixed = None if fixed is None else allowed.index(fixed)
    places = place(rng, len(facts.needles), units, len(allowed) + units - 1, fixed=place_of_fixed)
    starts = [allowed.start + number * allowed.step for number in places]
    return in_order(starts, facts.num_chains, rng) if facts.num_chains else starts


def _filled(
    haystack: Haystack, length: int, rng: random.Random, tokenizer: Tokenizer | None
) -> tuple[TokenArray, bytes | bytearray, range]:
    """Returns a haystack as tokens, the text that they stand for, and at which tokens needles may begin."""
    if tokenizer is None or tokenizer.digest == BYTES:
        text = haystack.fill(length, rng)
        return np.frombuffer(text, np.uint8), text, grid_of(haystack, text)
    parts: list[TokenArray] = []
    missing = length
    while missing > 0:
        filled = haystack.fill(min(_BYTES_PER_TOKEN * missing + 64, _BLOCK_BYTES), rng)
        part = tokenizer.encode(filled.decode(errors="ignore"))[:missing]
        parts.append(part)
        missing -= len(part)
    decoded = b"".join(tokenizer.decode(part).encode() for part in parts)
    return np.concatenate(parts), decoded, range(length)


def _plan(
    task: str,
    facts: Facts,
    length: int,
    rng: random.Random,
    depth: float | None,
    phase: int,
    min_distance: int,
    encode: Callable[[str], TokenArray],
    grid: range,
) -> TaskPlan:
    """Places needles and question; in a task without a depth, or at none, they may lie anywhere."""
    needles = [tuple(encode(needle.decode()).tolist()) for needle in facts.needles]
    questions = [_encoded(question, encode) for question in facts.questions]
    size = max(map(len, needles), default=0)
    space = length - max(len(tokens) for tokens, _ in questions) - min_distance - 1
    last = space - size
    if last < 0 or min_distance < 0 or length < TASKS[task].least:
        least = max(length - last + max(min_distance, 0) - min_distance, TASKS[task].least)
        raise InvalidArgument(f"length {length} with distance {min_distance}; {task} takes {least} or more")
    allowed = starts_in(grid, len(needles), size, space)
    fixed = None
    if depth is not None and TASKS[task].has_depth:
        fixed = allowed[_near(depth, len(allowed) - 1, phase, PHASES // math.gcd(allowed.step, PHASES))]
    starts = position(facts, rng, size, allowed, fixed) if needles else []
    placed = None
    if TASKS[task].has_depth:
        placed = starts.index(fixed) if fixed is not None else rng.randrange(len(questions))
    chosen = placed if len(questions) > 1 and placed is not None else 0
    tokens, spans = questions[chosen]
    asked_at = length - len(tokens)
    return TaskPlan(
        task=task,
        length=length,
        needles=tuple(Edit(start=start, tokens=needle) for start, needle in zip(starts, needles, strict=True)),
        asked=facts.asked,
        placed=placed,
        question=Edit(start=asked_at, tokens=tokens),
        answer_spans=tuple((asked_at + start, asked_at + end) for start, end in spans),
        any_order=facts.questions[chosen].any_order,
        depth=None if placed is None else starts[placed] / last if last else 0.0,
    )


def _near(depth: float, last: int, phase: int, count: int) -> int:
    """Returns the place of a phase among `count` places next to a depth; all that there are, where it is tight."""
    window = min(count, last + 1)
    first = min(max(round(depth * last) - window // 2, 0), last + 1 - window)
    return first + (phase - first) % window


def _encoded(
    question: Question, encode: Callable[[str], TokenArray]
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Returns the tokens of a question, and where its answers are; an answer begins and ends with a token."""
    tokens: list[int] = []
    spans = []
    for prompt, answer in question.queries:
        tokens += encode(prompt.decode()).tolist()
        start = len(tokens)
        tokens += encode(answer.decode()).tolist()
        spans.append((start, len(tokens)))
        tokens += encode(END.decode()).tolist()
    return tuple(tokens), tuple(spans)
