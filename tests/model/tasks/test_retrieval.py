"""Retrieval samples: what must hold of each, whatever its length, seed, depth and haystack."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.tasks.haystack import Haystack, NoiseHaystack, TextHaystack
from hsa_compile.model.tasks.retrieval import TASKS, make_edits, make_sample
from hsa_compile.model.tasks.sample import CHAIN_LENGTH, NEEDLE_BYTES, TaskSample

# Text that already assigns to every name that begins with a, and to a few others.
ASSIGNING = b" ".join(
    b"a%c%c=%04d" % (first, second, first * second) for first in range(97, 123) for second in range(97, 123)
)
TEXT = TextHaystack("text", b"def f(x, key=None): return 5 if x == 3 else dict(abc=x) # \xc3\xa9\n" * 40 + ASSIGNING)
HAYSTACKS: tuple[Haystack, ...] = (NoiseHaystack(), TEXT)

tasks = st.sampled_from(sorted(TASKS))
haystacks = st.sampled_from(HAYSTACKS)
numbers = st.integers(0, 2**32)
depths = st.none() | st.floats(0, 1)


def answers_of(sample: TaskSample) -> list[bytes]:
    return [sample.tokens[start:end].tobytes() for start, end in sample.answer_spans]


def looked_up(sample: TaskSample) -> list[bytes]:
    """The answers that a reader finds who sees what stands before the question, and the question."""
    text, question = sample.tokens.tobytes(), sample.plan.question
    known = dict(re.findall(rb" ([a-z]{3})=([a-z]{3}|\d{4})\.", b"".join(
        text[edit.start : edit.end] for edit in sample.plan.needles
    )))  # fmt: skip
    answers = []
    for name in re.findall(rb"\?([a-z]{3})=", text[question.start : question.end]):
        path = [known[name]]
        while path[-1] in known:
            path.append(known[path[-1]])
        answers.append(b"=".join(path))
    return answers


@given(tasks, haystacks, st.integers(260, 3000), numbers, numbers, depths, st.integers(0, 40))
def test_a_sample_has_its_length_its_needles_once_and_its_answers_in_place(
    task: str, haystack: Haystack, length: int, seed: int, index: int, depth: float | None, min_distance: int
) -> None:
    sample = make_sample(
        task, length=length, seed=seed, index=index, haystack=haystack, depth=depth, min_distance=min_distance
    )
    text = sample.tokens.tobytes()
    assert sample.tokens.dtype == np.uint8
    assert len(text) == length
    assert answers_of(sample) == looked_up(sample)
    assert text.endswith(sample.plan.question.text)
    before = text[: sample.plan.question.start]
    for needle in sample.plan.needles:
        assert text[needle.start : needle.end] == needle.text
        assert before.count(needle.text[1:5]) == 1  # its name is assigned nowhere else
        assert len(before) - needle.end > min_distance
    taken = sorted(sample.needle_starts)
    assert all(b - a >= NEEDLE_BYTES - 1 for a, b in itertools.pairwise(taken))


@given(tasks, haystacks, st.integers(400, 2000), numbers, st.floats(0, 1), st.integers(0, 64))
def test_the_depth_is_that_of_an_asked_needle(
    task: str, haystack: Haystack, length: int, seed: int, depth: float, min_distance: int
) -> None:
    options = {"length": length, "seed": seed, "index": 0, "haystack": haystack, "min_distance": min_distance}
    sample = make_sample(task, depth=depth, **options)  # type: ignore[arg-type]
    last = sample.plan.question.start - min_distance - 1 - NEEDLE_BYTES
    assert round(depth * last) in sample.plan.asked_starts
    assert sample.depth == pytest.approx(depth, abs=1 / last)
    if task != "vt":
        assert sample.needle_starts[0] == round(depth * last)


@given(tasks, numbers, numbers)
def test_a_sample_depends_on_its_arguments_alone(task: str, seed: int, index: int) -> None:
    first, again, other_seed, other_index = (
        make_sample(task, length=400, seed=each_seed, index=each_index, haystack=TEXT)
        for each_seed, each_index in ((seed, index), (seed, index), (seed + 1, index), (seed, index + 1))
    )
    assert np.array_equal(first.tokens, again.tokens)
    assert first.plan == again.plan
    assert not np.array_equal(first.tokens, other_seed.tokens)
    assert not np.array_equal(first.tokens, other_index.tokens)


def test_the_shortest_sample_is_needle_and_question_with_one_byte_between() -> None:
    sample = make_sample("s-niah", length=22, seed=0, index=0, haystack=HAYSTACKS[0])
    assert sample.needle_starts == (0,)
    assert sample.plan.question.start == 11
    with pytest.raises(InvalidArgument, match="length 21 with distance 0"):
        make_sample("s-niah", length=21, seed=0, index=0, haystack=HAYSTACKS[0])


def test_random_depths_cover_the_haystack() -> None:
    found = [
        make_sample("s-niah", length=1000, seed=0, index=index, haystack=HAYSTACKS[0]).depth for index in range(200)
    ]
    counts = np.histogram(found, bins=4, range=(0, 1))[0]
    assert min(counts) > 25


@pytest.mark.parametrize(
    ("task", "needles", "queries"), [("s-niah", 1, 1), ("mk-niah", 4, 1), ("mq-niah", 6, 2), ("vt", 6, 1)]
)
def test_the_numbers_are_the_authors(task: str, needles: int, queries: int) -> None:
    sample = make_sample(task, length=400, seed=0, index=0, haystack=HAYSTACKS[0])
    assert (len(sample.plan.needles), len(sample.answer_spans)) == (needles, queries)


def test_numbers_can_be_chosen() -> None:
    options = {"length": 900, "seed": 0, "index": 0, "haystack": HAYSTACKS[0]}
    sample = make_sample("mq-niah", num_needles=12, num_queries=5, **options)  # type: ignore[arg-type]
    assert (len(sample.plan.needles), len(answers_of(sample))) == (12, 5)
    sample = make_sample("vt", num_needles=9, num_queries=2, **options)  # type: ignore[arg-type]
    assert len(sample.plan.asked_starts) == 2 * CHAIN_LENGTH
    assert answers_of(sample) == looked_up(sample)


@given(numbers, depths)
def test_the_links_of_a_chain_stand_in_its_order(seed: int, depth: float | None) -> None:
    sample = make_sample("vt", length=500, seed=seed, index=0, haystack=HAYSTACKS[0], depth=depth)
    starts = sample.needle_starts
    assert list(starts[:3]) == sorted(starts[:3])
    assert list(starts[3:]) == sorted(starts[3:])


@given(tasks, haystacks, numbers)
def test_samples_of_one_base_differ_in_needles_and_question_only(task: str, haystack: Haystack, seed: int) -> None:
    base, plans = make_edits(task, length=1500, seed=seed, haystack=haystack, depths=[0.0, 0.5, 1.0, None])
    assert len(plans) == 4
    assert len({plan.question.text for plan in plans}) == 4
    for plan in plans:
        sample = plan.apply(base)
        changed = np.flatnonzero(sample.tokens != base)
        assert set(changed) <= {place for edit in plan.edits for place in range(edit.start, edit.end)}
        assert answers_of(sample) == looked_up(sample)
        for needle in plan.needles:
            assert sample.tokens[: plan.question.start].tobytes().count(needle.text[1:5]) == 1


def test_edits_lie_in_the_order_of_the_text_and_do_not_overlap() -> None:
    _, plans = make_edits("mq-niah", length=600, seed=3, haystack=HAYSTACKS[0], depths=[None] * 20)
    for plan in plans:
        assert all(a.end <= b.start for a, b in itertools.pairwise(plan.edits))
        assert plan.edits[-1].end == 600


def test_an_answer_counts_only_if_every_byte_is_right() -> None:
    sample = make_sample("mq-niah", length=400, seed=0, index=0, haystack=HAYSTACKS[0])
    predicted = sample.tokens.astype(np.int64)
    assert sample.is_answered_by(predicted)
    assert sample.is_answered_by(predicted[sample.answer_spans[0][0] :])
    outside = predicted.copy()
    outside[sample.plan.question.start] += 1
    assert sample.is_answered_by(outside)
    for start, end in sample.answer_spans:
        for place in range(start, end):
            wrong = predicted.copy()
            wrong[place] += 1
            assert not sample.is_answered_by(wrong)
    with pytest.raises(InvalidArgument, match="predictions; allowed are"):
        sample.is_answered_by(predicted[sample.answer_spans[0][0] + 1 :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "niah"}, "allowed are s-niah, mk-niah, mq-niah, vt"),
        ({"depth": 1.5}, r"depth 1\.5"),
        ({"length": 20}, "length 20 with distance 0"),
        ({"min_distance": -1}, "distance -1"),
        ({"num_queries": 3}, "num_queries 3"),
        ({"num_needles": 0}, "0 needles"),
        ({"num_needles": 80}, "do not fit"),
        ({"task": "vt", "num_needles": 4}, "multiples of 3"),
        ({"task": "vt", "num_queries": 3}, "1 query to one a chain"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    options = {"task": "s-niah", "length": 400, "seed": 0, "index": 0, "haystack": HAYSTACKS[0]} | changes
    with pytest.raises(InvalidArgument, match=message):
        make_sample(options.pop("task"), **options)  # type: ignore[arg-type]


def test_a_haystack_of_another_length_is_refused() -> None:
    _, (plan,) = make_edits("s-niah", length=100, seed=0, haystack=HAYSTACKS[0], depths=[0.5])
    with pytest.raises(InvalidArgument, match="haystack of 99 bytes; the sample has 100"):
        plan.apply(bytearray(99))


def test_a_text_that_assigns_to_every_name_is_refused() -> None:
    letters = range(97, 123)
    everything = b"".join(b"%c%c%c=" % (a, b, c) for a in letters for b in letters for c in letters)
    with pytest.raises(InvalidArgument, match="assigns to too many names"):
        make_sample("s-niah", length=len(everything), seed=0, index=0, haystack=TextHaystack("all", everything))


@pytest.mark.parametrize("haystack", HAYSTACKS, ids=["noise", "text"])
def test_no_two_samples_are_equal_and_each_asked_name_is_assigned_once(haystack: Haystack) -> None:
    seen = set()
    for task, length, index, depth in itertools.product(TASKS, (300, 4096), range(4), (0.0, 0.5, 1.0, None)):
        sample = make_sample(task, length=length, seed=7, index=index, haystack=haystack, depth=depth)
        whole, needles = sample.tokens.tobytes(), sorted((edit.start, edit.end) for edit in sample.plan.needles)
        assert len(whole) == length
        assert whole not in seen
        seen.add(whole)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(needles))
        if not TASKS[task].has_chains:
            text = whole[: sample.plan.question.start]
            for start, end in sample.answer_spans:
                name = whole[start - 4 : start - 1]
                assert text.count(name + b"=") == text.count(b" " + name + b"=" + whole[start:end] + b".") == 1
