"""The tasks, one description each: what is hidden, in what, and which public task it stands for.

`docs/tasks.md` says what differs from those.
"""

import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from hsa_compile.model.tasks.facts import (
    NUM_SAME,
    PLACES,
    Facts,
    Text,
    chains,
    common_words,
    frequent_words,
    lookups,
    moves,
    several_values,
    similar_lookups,
    which_of_alike,
    workplaces,
    workplaces_of_bosses,
)
from hsa_compile.model.tasks.haystack import FREQUENT, MADE, NEEDLES, NOISE, TEXT, WORDS, Haystack


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a task asks, and what its figures are to be compared with.

    Attributes:
        make: draws needles and question from a seed and the text of the haystack.
        haystack: the name of what the needles are hidden in, one of `haystack.MADE`, or `TEXT` for real text.
        public: the public task that it stands for.
        chance: how often an answer of the right form is right that was guessed without reading.
        any_needle: how often a reader is right who finds the needles but takes any of them for the asked one.
        has_depth: whether the asked needle has a place of its own; otherwise the answer is all over the text.
        least: the length in tokens below which the question has no certain answer.
    """

    make: Callable[[random.Random, Text], Facts]
    haystack: str
    public: str
    chance: float
    any_needle: float = 0.0
    has_depth: bool = True
    least: int = 0


_FOUR_DIGITS = 1e-4
_PLACE = 1 / len(PLACES)

TASKS: Mapping[str, Task] = {
    "s-niah": Task(
        make=partial(lookups, num_needles=1),
        haystack=NOISE, public="RULER niah_single_1", chance=_FOUR_DIGITS, any_needle=1,
    ),
    "s-niah-words": Task(
        make=partial(lookups, num_needles=1),
        haystack=WORDS, public="RULER niah_single_3", chance=_FOUR_DIGITS, any_needle=1,
    ),
    "s-niah-text": Task(
        make=partial(lookups, num_needles=1),
        haystack=TEXT, public="RULER niah_single_2", chance=_FOUR_DIGITS, any_needle=1,
    ),
    "mk-niah": Task(
        make=partial(lookups, num_needles=4),
        haystack=TEXT, public="RULER niah_multikey_1", chance=_FOUR_DIGITS, any_needle=1 / 4,
    ),
    "mk-niah-needles": Task(
        make=partial(lookups, num_needles=1),
        haystack=NEEDLES, public="RULER niah_multikey_2", chance=_FOUR_DIGITS,
    ),
    "mk-niah-similar": Task(
        make=partial(similar_lookups, num_needles=16),
        haystack=NEEDLES, public="RULER niah_multikey_3", chance=_FOUR_DIGITS,
    ),
    "mv-niah": Task(
        make=partial(several_values, num_needles=NUM_SAME),
        haystack=TEXT, public="RULER niah_multivalue", chance=24 * _FOUR_DIGITS**4, any_needle=24 / 4**4,
    ),
    "mq-niah": Task(
        make=partial(lookups, num_needles=6, num_queries=2),
        haystack=TEXT, public="RULER niah_multiquery", chance=_FOUR_DIGITS**2, any_needle=1 / 36,
    ),
    "vt": Task(
        make=partial(chains, num_chains=2),
        haystack=NOISE, public="RULER vt", chance=_FOUR_DIGITS / 26**6, any_needle=1 / 2,
    ),
    "cwe": Task(
        make=common_words,
        haystack=WORDS, public="RULER cwe", chance=26.0**-15, has_depth=False,
    ),
    "fwe": Task(
        make=frequent_words,
        haystack=FREQUENT, public="RULER fwe", chance=26.0**-15, has_depth=False, least=2048,
    ),
    "qa-1": Task(
        make=partial(workplaces, num_needles=8),
        haystack=TEXT, public="RULER qa_1 (SQuAD)", chance=_PLACE, any_needle=1 / 8 + 7 / 8 * _PLACE,
    ),
    "qa-2": Task(
        make=partial(workplaces_of_bosses, num_chains=4),
        haystack=TEXT, public="RULER qa_2 (HotpotQA)", chance=_PLACE, any_needle=1 / 4 + 3 / 4 * _PLACE,
    ),
    "facts-1": Task(
        make=partial(moves, num_facts=1, num_people=4),
        haystack=TEXT, public="BABILong qa1", chance=_PLACE, any_needle=1 / 8 + 6 / 8 * _PLACE,
    ),
    "facts-2": Task(
        make=partial(moves, num_facts=2, num_people=4),
        haystack=TEXT, public="BABILong qa2", chance=_PLACE, any_needle=1 / 8 + 6 / 8 * _PLACE,
    ),
    "facts-3": Task(
        make=partial(moves, num_facts=3, num_people=4),
        haystack=TEXT, public="BABILong qa3", chance=_PLACE, any_needle=1 / 12 + 9 / 12 * _PLACE,
    ),
    "mrcr": Task(
        make=partial(which_of_alike, num_needles=8),
        haystack=TEXT, public="MRCR, eight needles", chance=_FOUR_DIGITS, any_needle=1 / 8,
    ),
}  # fmt: skip


def haystack_of(task: str, text: Haystack | None) -> Haystack:
    """Returns what the needles of a task are hidden in.

    Args:
        task: one of `TASKS`.
        text: the real text, for tasks that are asked in one.
    """
    if TASKS[task].haystack != TEXT:
        return MADE[TASKS[task].haystack]
    assert text is not None, f"{task} needs a text"
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much the needles and the question of a task take; bytes, and no more tokens of any vocabulary.

    Attributes:
        num_needles: how many needles there are.
        needle: the size of the largest.
        question: the size of the question with its answers.
        prompt: the size of what stands before its first answer.
        least: the length of the shortest sample in which they have room, wherever the first one lies.
    """

    num_needles: int
    needle: int
    question: int
    prompt: int
    least: int


@functools.cache
def sizes(task: str) -> Sizes:
    """Measures a task; all its samples are equally large."""
    kind, rng = TASKS[task], random.Random(task)
    facts = kind.make(rng, MADE[FREQUENT].fill(4096, rng) if kind.haystack == FREQUENT else b"")
    question = len(facts.question.text)
    num_needles, needle = len(facts.needles), max(map(len, facts.needles), default=0)
    places = num_needles + (num_needles > 1)  # one may be lost to where the first one lies
    return Sizes(
        num_needles=num_needles,
        needle=needle,
        question=question,
        prompt=facts.question.answer_spans[0][0],
        least=max(places * needle + 1 + question, kind.least),
    )
