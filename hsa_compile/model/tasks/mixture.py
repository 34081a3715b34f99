"""Training rows: plain text, and rows of several needles with several questions, whose answers carry the loss.

One question a row teaches nothing in the time that several take, so a row has many: it is cut in episodes of random
length, each with needles, then a distance, then questions. A name belongs to one episode, and stands nowhere else.
"""

import random
from dataclasses import dataclass

import numpy as np

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.corpus import DocumentOrder, TokenCorpus, TrainingSample, plain_sample
from hsa_compile.model.tasks.facts import (
    CHAIN_LENGTH,
    CHAIN_QUERY_BYTES,
    END,
    LETTERS,
    NEEDLE_BYTES,
    NUM_SAME,
    QUERY_BYTES,
    chain_facts,
    draw_keys,
    few_letters,
    lookup_facts,
)
from hsa_compile.model.tasks.family import TASKS, haystack_of, sizes
from hsa_compile.model.tasks.haystack import NEEDLES, TEXT, Haystack, grid_of
from hsa_compile.model.tasks.retrieval import from_place, position, starts_in, write_sample

# The fields of a mixture, and of a stage of training, that are shares of 1.
SHARES = ("synthetic_share", "chain_share", "late_share", "similar_share", "value_share", "task_share")
_LATE_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What training rows are drawn from, and what they count.

    Attributes:
        haystacks: (haystack, weight) for synthetic rows.
        corpus: what plain rows are windows of; None if all rows are synthetic.
        order: what plain rows are stretches of instead, where their place in it is told.
        synthetic_share: the share of rows that are synthetic, 0 to 1.
        chain_share: the share of episodes that track variables in chains instead of looking up needles, 0 to 1.
        late_share: the share of episodes whose first asked needle lies as late as `min_distance` allows, or a little
            earlier, 0 to 1. Otherwise a long row would have needles within a window of their question too seldom.
        similar_share: the share of rows of nothing but needles whose names are made of few letters, 0 to 1. Among a
            million bytes of needles many names come close to any, in all but a letter or the order of letters; among
            two thousand hardly one does.
        value_share: the share of episodes without chains in which each name has `NUM_SAME` values, all of which are
            asked for, 0 to 1; fewer where four values do not fit.
        task_share: the share of synthetic rows whose episodes are samples of `tasks` instead, 0 to 1.
        tasks: (name of one of `TASKS`, weight); those that are asked in real text take one of `haystacks`.
        num_needles: the fewest and the most that an episode has; fewer where they do not fit.
        num_queries: the fewest and the most that an episode has; never more than there are needles (or chains).
        min_distance: more than so many bytes lie between an episode's needles and its questions, such as the window.
        min_episode: the length in bytes of the shortest episode; None makes one episode a row.
        text_weight: what a synthetic row's bytes count in the loss.
        answer_weight: what the bytes of its answers count, and the byte after each, which ends it.
        corpus_weight: what a plain row's tokens count.
    """

    haystacks: tuple[tuple[Haystack, float], ...] = ()
    corpus: TokenCorpus | None = None
    order: DocumentOrder | None = None
    synthetic_share: float = 1.0
    chain_share: float = 0.0
    late_share: float = 0.0
    similar_share: float = 0.0
    value_share: float = 0.0
    task_share: float = 0.0
    tasks: tuple[tuple[str, float], ...] = ()
    num_needles: tuple[int, int] = (2, 6)
    num_queries: tuple[int, int] = (1, 4)
    min_distance: int = 64
    min_episode: int | None = None
    text_weight: float = 0.2
    answer_weight: float = 1.0
    corpus_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidArgument(f"{name} {getattr(self, name)}; allowed is 0 to 1")
        for name in ("num_needles", "num_queries"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise InvalidArgument(f"{name} {least} to {most}; allowed are 1 or more, the smaller first")
        if self.min_distance < 0:
            raise InvalidArgument(f"min_distance {self.min_distance}; allowed is 0 or more")
        if self.synthetic_share and not any(weight > 0 for _, weight in self.haystacks):
            raise InvalidArgument(
                "synthetic rows without a haystack; allowed is synthetic_share 0, or one of weight > 0"
            )
        if unknown := [name for name, _ in self.tasks if name not in TASKS]:
            raise InvalidArgument(f"task {unknown[0]!r}; allowed are {', '.join(TASKS)}")
        if self.task_share and not any(weight > 0 for _, weight in self.tasks):
            raise InvalidArgument(f"task_share {self.task_share} without a task; allowed is 0, or one of weight > 0")
        if self.synthetic_share < 1 and self.corpus is None:
            raise InvalidArgument(f"synthetic_share {self.synthetic_share} without a corpus; allowed is 1")
        if self.synthetic_share and self.corpus is not None and not self.corpus.has_bytes:
            raise InvalidArgument(
                "synthetic rows are bytes; the corpus needs the tokenizer bytes, or synthetic_share 0"
            )
        if self.min_episode is not None and self.min_episode < self.least_length:
            raise InvalidArgument(f"min_episode {self.min_episode}; allowed is {self.least_length} or more")

    @property
    def least_length(self) -> int:
        """How many bytes the smallest episode takes: one needle, the distance, one question."""
        return NEEDLE_BYTES + self.min_distance + 1 + QUERY_BYTES


def training_sample(
    mixture: Mixture, length: int, seed: int, index: int, place: int | None = None
) -> TrainingSample:  # fmt: skip
    """Makes a row of exactly `length`, the same for the same arguments in every process.

    Args:
        mixture: what rows are drawn from.
        length: how many tokens the row has.
        seed: the seed of the run.
        index: the number of the row in the run.
        place: where a plain row begins in the mixture's order of documents.

    Raises:
        InvalidArgument: the row is too short for an episode, or longer than the corpus.
    """
    rng = random.Random(f"train {seed} {index} {length}")
    if rng.random() >= mixture.synthetic_share:
        assert mixture.corpus is not None  # checked when the mixture was made
        if mixture.order is not None and place is not None:
            return plain_sample(mixture.order.read(place, length), mixture.corpus_weight)
        return plain_sample(mixture.corpus.sample(index, length, seed=seed), mixture.corpus_weight)
    if length < mixture.least_length:
        raise InvalidArgument(f"length {length}; a synthetic row takes {mixture.least_length} or more")
    haystack = _draw_haystack(mixture, rng)
    text = haystack.fill(length, rng)
    grid = grid_of(haystack, text)
    bounds = _bounds(mixture, length, rng)
    has_tasks = mixture.task_share > 0 and rng.random() < mixture.task_share
    if has_tasks and (spans := _write_tasks(text, grid, bounds, mixture, rng)):
        return _weighted(text, spans, mixture)
    episodes = [_Size.draw(mixture, end - begin, rng) for begin, end in bounds]
    letters = LETTERS
    if haystack.name == NEEDLES and rng.random() < mixture.similar_share:
        letters = few_letters(rng, length)
        text = text.translate(bytes.maketrans(LETTERS, (letters * len(LETTERS))[: len(LETTERS)]))
    keys = draw_keys(rng, sum(size.num_needles for size in episodes), text, letters)
    spans = []
    for (begin, end), size in zip(bounds, episodes, strict=True):
        own, keys = keys[: size.num_needles], keys[size.num_needles :]
        spans += _write_episode(text, grid, begin, end, own, size, mixture, rng)
    return _weighted(text, spans, mixture)


def _weighted(text: bytearray, spans: list[tuple[int, int]], mixture: Mixture) -> TrainingSample:
    loss_weights = np.full(len(text), mixture.text_weight, np.float32)
    loss_weights[0] = 0
    for start, end in spans:
        loss_weights[start : end + len(END)] = mixture.answer_weight
    return TrainingSample(tokens=np.frombuffer(text, np.uint8), loss_weights=loss_weights, answer_spans=tuple(spans))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """How much an episode holds."""

    num_needles: int
    num_queries: int
    has_chains: bool = False
    has_values: bool = False

    @classmethod
    def draw(cls, mixture: Mixture, length: int, rng: random.Random) -> "_Size":
        """Draws sizes within what fits: a query is given up before a needle, a chain before either."""
        needles, queries = rng.randint(*mixture.num_needles), rng.randint(*mixture.num_queries)
        room = length - mixture.min_distance - 1
        chain_bytes = CHAIN_LENGTH * NEEDLE_BYTES
        if rng.random() < mixture.chain_share and room >= chain_bytes + CHAIN_QUERY_BYTES:
            chains = min(max(needles // CHAIN_LENGTH, 1), (room - CHAIN_QUERY_BYTES) // chain_bytes)
            queries = min(queries, chains, (room - chains * chain_bytes) // CHAIN_QUERY_BYTES)
            return cls(num_needles=chains * CHAIN_LENGTH, num_queries=queries, has_chains=True)
        needles = min(needles, (room - QUERY_BYTES) // NEEDLE_BYTES)
        names = min(max(1, min(needles, queries) // NUM_SAME), room // (NUM_SAME * (NEEDLE_BYTES + QUERY_BYTES)))
        if names and mixture.value_share and rng.random() < mixture.value_share:
            return cls(num_needles=names * NUM_SAME, num_queries=names * NUM_SAME, has_values=True)
        queries = min(queries, needles, (room - needles * NEEDLE_BYTES) // QUERY_BYTES)
        return cls(num_needles=needles, num_queries=queries)


def _late_start(num_needles: int, space: int, rng: random.Random) -> int | None:
    """Returns where a needle begins that lies at or near the end of `[0, space)`; None if others find no room."""
    gap = int(rng.random() ** 2 * min(_LATE_BYTES, space - num_needles * NEEDLE_BYTES + 1))
    start = space - NEEDLE_BYTES - gap
    return start if start // NEEDLE_BYTES + gap // NEEDLE_BYTES >= num_needles - 1 else None


def _draw_haystack(mixture: Mixture, rng: random.Random) -> Haystack:
    names, weights = zip(*mixture.haystacks, strict=True)
    chosen: Haystack = names[0] if len(names) == 1 else rng.choices(names, weights)[0]
    return chosen


def _bounds(mixture: Mixture, length: int, rng: random.Random) -> list[tuple[int, int]]:
    """Cuts a row in episodes of random length."""
    least = mixture.min_episode or length
    bounds = []
    begin = 0
    while begin < length:
        left = length - begin
        size = left if left < 2 * least else rng.randint(least, left)
        end = length if left - size < least else begin + size
        bounds.append((begin, end))
        begin = end
    return bounds


def _write_episode(
    text: bytearray,
    grid: range,
    begin: int,
    end: int,
    keys: list[bytes],
    size: _Size,
    mixture: Mixture,
    rng: random.Random,
) -> list[tuple[int, int]]:
    """Hides needles, writes the question at the end, and returns where its answers are."""
    if size.has_values:
        keys = [key for key in keys[::NUM_SAME] for _ in range(NUM_SAME)]
    facts = (chain_facts if size.has_chains else lookup_facts)(rng, keys, size.num_queries)
    asked_at = end - len(facts.question.text)
    space = asked_at - mixture.min_distance - 1 - begin
    allowed = starts_in(from_place(grid, begin), len(facts.needles), NEEDLE_BYTES, space)
    fixed = None
    if mixture.late_share and rng.random() < mixture.late_share:
        late = _late_start(len(facts.needles), space, rng)
        fixed = None if late is None else allowed[max(late - allowed.start, 0) // allowed.step]
    for start, needle in zip(position(facts, rng, NEEDLE_BYTES, allowed, fixed), facts.needles, strict=True):
        text[begin + start : begin + start + len(needle)] = needle
    text[asked_at:end] = facts.question.text
    return [(asked_at + start, asked_at + stop) for start, stop in facts.question.answer_spans]


def _write_tasks(
    text: bytearray, grid: range, bounds: list[tuple[int, int]], mixture: Mixture, rng: random.Random
) -> list[tuple[int, int]]:
    """Writes a sample of one of the tasks over each episode in which one fits, and returns where the answers are."""
    spans: list[tuple[int, int]] = []
    for begin, end in bounds:
        fitting = [(name, weight) for name, weight in mixture.tasks
                   if weight > 0 and sizes(name).least + mixture.min_distance <= end - begin]  # fmt: skip
        if fitting:
            names, weights = zip(*fitting, strict=True)
            task = rng.choices(names, weights)[0]
            own = from_place(grid, begin)
            if TASKS[task].haystack != TEXT:
                made = haystack_of(task, None)
                text[begin:end] = made.fill(end - begin, rng)
                own = grid_of(made, text[begin:end])
            spans += write_sample(task, text, begin, end, rng, grid=own, min_distance=mixture.min_distance)
    return spans
