"""Samples of the tasks: what must hold of each, whatever its length, seed, depth and haystack."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reader import answers

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.tokenizer import BytesTokenizer
from hsa_compile.model.tasks.facts import NEEDLE_BYTES
from hsa_compile.model.tasks.family import TASKS, haystack_of, sizes
from hsa_compile.model.tasks.haystack import MADE, NEEDLES, Haystack, NoiseHaystack, TextHaystack
from hsa_compile.model.tasks.retrieval import PHASES, Asked, make_edits, make_sample
from hsa_compile.model.tasks.sample import TaskSample

# Text that already assigns to every name that begins with a, and to a few others, and holds many numbers.
ASSIGNING = b" ".join(
    b"a%c%c=%04d" % (first, second, first * second) for first in range(97, 123) for second in range(97, 123)
)
TEXT = TextHaystack("text", b"def f(x, key=None): return 5 if x == 3 else dict(abc=x) # \xc3\xa9\n" * 40 + ASSIGNING)
HAYSTACKS: tuple[Haystack, ...] = (NoiseHaystack(), TEXT)
PLACED = [name for name, task in TASKS.items() if task.has_depth]

tasks = st.sampled_from(list(TASKS))
placed_tasks = st.sampled_from(PLACED)
haystacks = st.sampled_from(HAYSTACKS)
numbers = st.integers(0, 2**32)
depths = st.none() | st.floats(0, 1)


def sample_of(task: str, length: int, seed: int = 0, index: int = 0, **options: object) -> TaskSample:
    return make_sample(
        task, length=max(length, sizes(task).least + 40), seed=seed, index=index, haystack=haystack_of(task, TEXT),
        **options,
    )  # fmt: skip


@given(tasks, st.integers(40, 3000), numbers, numbers, depths, st.integers(0, 40))
def test_a_sample_has_its_length_its_needles_and_its_answers_in_place(
    task: str, length: int, seed: int, index: int, depth: float | None, min_distance: int
) -> None:
    sample = sample_of(task, length, seed, index, depth=depth, min_distance=min_distance)
    text = sample.tokens.tobytes()
    assert sample.tokens.dtype == np.uint8
    assert len(text) == max(length, sizes(task).least + 40)
    assert text.endswith(bytes(sample.plan.question.tokens))
    before = text[: sample.plan.question.start]
    for needle in sample.plan.needles:
        assert text[needle.start : needle.end] == bytes(needle.tokens)
        assert len(before) - needle.end > min_distance
    assert all(a.end <= b.start for a, b in itertools.pairwise(sample.plan.edits))
    end = 0
    for number, (start, stop) in enumerate(sample.answer_spans):
        asked = text[sample.plan.question.start + end : start]
        right = answers(text[: start - len(asked)], asked)
        assert text[start:stop] in right, (asked, text[start:stop])
        assert len(right) == (len(sample.answer_spans) - number if sample.plan.any_order else 1)
        assert text[stop : stop + 1] == b"."
        end = stop + 1 - sample.plan.question.start


@given(placed_tasks, st.integers(400, 2000), numbers, numbers, st.floats(0, 1), st.integers(0, 64))
def test_the_depth_is_that_of_an_asked_needle(
    task: str, length: int, seed: int, index: int, depth: float, min_distance: int
) -> None:
    sample = sample_of(task, length + 600, seed, index, depth=depth, min_distance=min_distance)
    plan = sample.plan
    last = plan.question.start - min_distance - 1 - sizes(task).needle
    assert plan.placed in plan.asked
    start = plan.needles[plan.placed].start
    assert plan.depth == start / last
    assert 0 <= start <= last
    # Among needles a needle begins at every tenth byte, so that as many offsets take more room.
    reach = NEEDLE_BYTES * (PHASES // 2 + 1) if TASKS[task].haystack == NEEDLES else PHASES
    assert abs(start - depth * last) <= reach


def test_the_outermost_needles_touch_the_beginning_and_the_question() -> None:
    starts = {
        depth: {sample_of("s-niah", 400, index=index, depth=depth).needle_starts[0] for index in range(PHASES)}
        for depth in (0.0, 1.0)
    }
    last = 400 - 11 - 1 - 10
    assert starts == {0.0: set(range(PHASES)), 1.0: set(range(last - PHASES + 1, last + 1))}


@given(tasks, numbers, numbers)
def test_a_sample_depends_on_its_arguments_alone(task: str, seed: int, index: int) -> None:
    first, again, other_seed, other_index = (
        sample_of(task, 400, each_seed, each_index)
        for each_seed, each_index in ((seed, index), (seed, index), (seed + 1, index), (seed, index + 1))
    )
    assert np.array_equal(first.tokens, again.tokens)
    assert first.plan == again.plan
    assert not np.array_equal(first.tokens, other_seed.tokens)
    assert not np.array_equal(first.tokens, other_index.tokens)


@pytest.mark.parametrize("task", TASKS)
def test_all_samples_of_a_task_are_equally_large(task: str) -> None:
    for index in range(20):
        plan = sample_of(task, 700, index=index).plan
        size = sizes(task)
        assert len(plan.needles) == size.num_needles
        assert max((edit.end - edit.start for edit in plan.needles), default=0) == size.needle
        assert len(plan.question.tokens) == size.question
        assert plan.answer_spans[0][0] == plan.length - size.question + size.prompt


def test_the_shortest_sample_is_needle_and_question_with_one_byte_between() -> None:
    sample = make_sample("s-niah", length=22, seed=0, index=0, haystack=HAYSTACKS[0])
    assert sample.needle_starts == (0,)
    assert sample.plan.question.start == 11
    with pytest.raises(InvalidArgument, match="length 21 with distance 0; s-niah takes 22 or more"):
        make_sample("s-niah", length=21, seed=0, index=0, haystack=HAYSTACKS[0])


def test_random_depths_cover_the_haystack() -> None:
    found = [sample_of("s-niah", 1000, index=index).depth for index in range(200)]
    counts = np.histogram(found, bins=4, range=(0, 1))[0]
    assert min(counts) > 25


def test_each_of_eight_alike_is_asked_for() -> None:
    plans = [sample_of("mrcr", 2000, index=index, depth=0.5).plan for index in range(60)]
    assert len({plan.placed for plan in plans}) >= 6
    assert all(b"#%d=" % (plan.placed + 1) in bytes(plan.question.tokens) for plan in plans)
    assert {sample_of("mrcr", 2000, index=index).plan.placed for index in range(100)} == set(range(8))


@given(numbers, depths)
def test_the_links_of_a_chain_stand_in_its_order(seed: int, depth: float | None) -> None:
    starts = sample_of("vt", 500, seed, depth=depth).needle_starts
    assert list(starts[:3]) == sorted(starts[:3])
    assert list(starts[3:]) == sorted(starts[3:])


@given(tasks, numbers)
def test_samples_of_one_base_differ_in_needles_and_question_only(task: str, seed: int) -> None:
    asked = [Asked(depth=depth, index=index) for index, depth in enumerate([0.0, 0.5, 1.0, None])]
    length = max(1500, sizes(task).least)
    base, plans = make_edits(task, length=length, seed=seed, haystack=haystack_of(task, TEXT), asked=asked)
    assert len(plans) == 4
    for plan in plans:
        changed = np.flatnonzero(plan.apply(base).tokens != base)
        assert set(changed) <= {place for edit in plan.edits for place in range(edit.start, edit.end)}


def test_an_answer_counts_only_if_every_byte_is_right() -> None:
    sample = sample_of("mq-niah", 400)
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


def test_several_values_may_come_in_any_order_but_each_once() -> None:
    sample = sample_of("mv-niah", 400)
    values = [sample.tokens[start:end].copy() for start, end in sample.answer_spans]

    def written(order: Sequence[int]) -> np.ndarray:
        tokens = sample.tokens.copy()
        for (start, end), number in zip(sample.answer_spans, order, strict=True):
            tokens[start:end] = values[number]
        return tokens

    for order in itertools.product(range(4), repeat=4):
        assert sample.is_answered_with(written(order)) == (len(set(order)) == 4)
    assert not sample.is_answered_with([*written([0, 1, 2, 3])[:-1], ord(",")])
    first, last = sample.answer_spans[0], sample.answer_spans[-1]
    for number, value in enumerate(values):  # given the true answers before: the first may be any, the last one only
        for (start, end), is_right in ((first, True), (last, number == 3)):
            predicted = sample.tokens.copy()
            predicted[start] = value[0]
            assert sample.is_answered_by(predicted) == (is_right or value[0] == sample.tokens[start])
            predicted[start:end] = value
            assert sample.is_answered_by(predicted) == np.array_equal(value, sample.tokens[start:end])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "niah"}, "allowed are s-niah, s-niah-words, "),
        ({"depth": 1.5}, r"depth 1\.5"),
        ({"length": 20}, "length 20 with distance 0; s-niah takes 22 or more"),
        ({"length": 30, "min_distance": 9}, "length 30 with distance 9; s-niah takes 31 or more"),
        ({"min_distance": -1}, "distance -1"),
        ({"task": "cwe"}, "do not fit"),
        ({"task": "fwe"}, "fwe takes 2048 or more"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    options = {"task": "s-niah", "length": 400, "seed": 0, "index": 0, "haystack": HAYSTACKS[0]} | changes
    with pytest.raises(InvalidArgument, match=message):
        make_sample(options.pop("task"), **options)  # type: ignore[arg-type]


def test_a_haystack_of_another_length_is_refused() -> None:
    _, (plan,) = make_edits("s-niah", length=100, seed=0, haystack=HAYSTACKS[0], asked=[Asked(depth=0.5)])
    with pytest.raises(InvalidArgument, match="haystack of 99 tokens; the sample has 100"):
        plan.apply(np.zeros(99, np.uint8))


def test_a_text_that_holds_every_name_is_refused() -> None:
    letters = range(97, 123)
    everything = b"".join(b"%c%c%c=" % (a, b, c) for a in letters for b in letters for c in letters)
    with pytest.raises(InvalidArgument, match="assigns to too many names"):
        make_sample("s-niah", length=len(everything), seed=0, index=0, haystack=TextHaystack("all", everything))


class PairTokenizer(BytesTokenizer):
    """Two letters that stand side by side are one token; like all of its kind, it has no more tokens than bytes."""

    name = digest = "pairs"
    vocab_size = 2**16

    def encode(self, text: str) -> np.ndarray:
        data, tokens = text.encode(), []
        while data:
            size = 2 if data[:2].isalpha() and len(data) > 1 else 1
            tokens.append(int.from_bytes(data[:size], "big"))
            data = data[size:]
        return np.array(tokens, np.uint16)

    def decode(self, tokens: object) -> str:
        text = b"".join(int(token).to_bytes(2, "big").lstrip(b"\0") or b"\0" for token in np.asarray(tokens))
        return text.decode(errors="replace")


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_asked_in_any_vocabulary(task: str) -> None:
    tokenizer, text = PairTokenizer(), TextHaystack("text", b"some words of a text, with numbers: 12\n" * 99)
    length = max(1200, sizes(task).least)
    haystack: Callable[..., Haystack] = haystack_of
    asked = [Asked(depth=depth, index=index) for index, depth in enumerate((0.0, 0.3, 1.0))]
    base, plans = make_edits(
        task, length=length, seed=1, haystack=haystack(task, text), asked=asked, tokenizer=tokenizer
    )  # fmt: skip
    assert base.dtype == np.uint16
    assert len(base) == length
    for plan in plans:
        sample = plan.apply(base)
        read = tokenizer.decode(sample.tokens[: plan.question.start]).encode()
        asked_for = tokenizer.decode(sample.tokens[plan.question.start : plan.answer_spans[0][0]]).encode()
        right = tokenizer.decode(sample.tokens[slice(*plan.answer_spans[0])]).encode()
        assert right in answers(read, asked_for)
        assert len(plan.question.tokens) <= sizes(task).question
        assert all(edit.end - edit.start <= sizes(task).needle for edit in plan.needles)


def test_every_made_haystack_is_used_by_a_task() -> None:
    assert {task.haystack for task in TASKS.values()} == {*MADE, "text"}


def test_the_page_of_tasks_has_the_name_the_public_task_and_the_chance_of_each() -> None:
    page = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(TASKS)
    for row, task in zip(rows, TASKS.values(), strict=True):
        assert row[3].replace("`", "").removesuffix(" with eight needles") == task.public.removesuffix(
            ", eight needles"
        )
        if task.chance >= 1e-4:
            assert float(row[4]) == 100 * task.chance
        assert float(row[5]) == pytest.approx(100 * task.any_needle, rel=0.03)
