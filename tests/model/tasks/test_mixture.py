"""Training rows."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reader import answers

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.corpus import TokenCorpus, TrainingSample
from hsa_compile.model.data.documents import find_sources
from hsa_compile.model.data.prepare import prepare
from hsa_compile.model.tasks.family import TASKS, sizes
from hsa_compile.model.tasks.haystack import MADE, Haystack, NoiseHaystack, TextHaystack
from hsa_compile.model.tasks.mixture import Mixture, training_sample

LETTERS = b"abcdefghijklmnopqrstuvwxyz"
NOISE = ((NoiseHaystack(), 1.0),)
# Code that assigns to every fifth name or so.
CODE_TEXT = b"x = f()\n" + b", ".join(b"%c%c%c=1" % (a, b, c) for a in b"aeiou" for b in LETTERS for c in LETTERS)
CODE = ((TextHaystack("code", CODE_TEXT), 1.0),)
NEEDLES = ((MADE["needles"], 1.0),)
numbers = st.integers(0, 2**32)


def questions(row: TrainingSample) -> list[tuple[bytes, bytes, int]]:
    """(name, answer, where the question begins) of each answer."""
    text = row.tokens.tobytes()
    return [(text[start - 4 : start - 1], text[start:end], start - 6) for start, end in row.answer_spans]


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    fewest, least = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    min_distance = draw(st.integers(0, 64))
    return Mixture(
        haystacks=draw(st.sampled_from((NOISE, CODE, NEEDLES, NOISE + CODE))),
        chain_share=draw(st.sampled_from((0.0, 0.5, 1.0))),
        late_share=draw(st.sampled_from((0.0, 0.5, 1.0))),
        similar_share=draw(st.sampled_from((0.0, 0.5, 1.0))),
        num_needles=(fewest, fewest + draw(st.integers(0, 6))),
        num_queries=(least, least + draw(st.integers(0, 4))),
        min_distance=min_distance,
        min_episode=draw(st.none() | st.integers(min_distance + 22, 150)),
    )


@given(mixtures(), st.integers(90, 1200), numbers, numbers)
def test_every_answer_stands_far_enough_before_its_question_and_nowhere_else(
    mixture: Mixture, length: int, seed: int, index: int
) -> None:
    row = training_sample(mixture, length, seed, index)
    text = row.tokens.tobytes()
    assert len(text) == len(row.loss_weights) == length
    assert row.answer_spans
    for name, value, asked_at in questions(row):
        assert text[asked_at : asked_at + 2] == b" ?"
        assert text.index(name + b"=") < asked_at
        for key, source in _hops(name, value):
            found = [match.start() for match in re.finditer(b" %s=%s" % (re.escape(key), re.escape(source)), text)]
            assert len(found) == 1
            assert _question_of(asked_at, row) - (found[0] + len(key) + len(source) + 3) > mixture.min_distance
            assert text[:asked_at].count(key + b"=") == 1


def _hops(name: bytes, answer: bytes) -> list[tuple[bytes, bytes]]:
    path = [name, *answer.split(b"=")]
    return list(itertools.pairwise(path))


def _question_of(asked_at: int, row: TrainingSample) -> int:
    """Where the block of questions begins that a question belongs to."""
    text = row.tokens.tobytes()
    begin = asked_at
    for _, end in reversed([span for span in row.answer_spans if span[1] <= asked_at]):
        if end + 1 != begin or text[end : end + 1] != b".":
            break
        begin = text.rindex(b" ?", 0, end)
    return begin


@given(mixtures(), st.integers(90, 600), numbers)
def test_answers_carry_the_loss(mixture: Mixture, length: int, seed: int) -> None:
    row = training_sample(mixture, length, seed, 0)
    expected = np.full(length, 0.2, np.float32)
    expected[0] = 0
    for start, end in row.answer_spans:
        expected[start : end + 1] = 1  # the full stop too
    assert np.array_equal(row.loss_weights, expected)


@given(mixtures(), numbers, numbers)
def test_a_row_depends_on_its_arguments_alone(mixture: Mixture, seed: int, index: int) -> None:
    row, again = (training_sample(mixture, 300, seed, index) for _ in range(2))
    assert np.array_equal(row.tokens, again.tokens)
    assert not np.array_equal(row.tokens, training_sample(mixture, 300, seed, index + 1).tokens)
    assert not np.array_equal(row.tokens, training_sample(mixture, 300, seed + 1, index).tokens)


def test_a_long_row_holds_many_episodes_and_a_name_once() -> None:
    mixture = Mixture(haystacks=NOISE, min_distance=32, min_episode=128)
    counts = [len(training_sample(mixture, 2048, 0, index).answer_spans) for index in range(50)]
    assert max(counts) > 10
    row = training_sample(mixture, 2048, 0, int(np.argmax(counts)))
    names = [name for name, _, _ in questions(row)]
    assert len(set(names)) == len(names)


def test_needles_come_at_all_depths() -> None:
    mixture = Mixture(haystacks=NOISE, num_needles=(1, 1), num_queries=(1, 1), min_distance=16)
    places = []
    for index in range(300):
        row = training_sample(mixture, 400, 0, index)
        (name, _, _) = questions(row)[0]
        places.append(row.tokens.tobytes().index(name + b"="))
    assert min(np.histogram(places, bins=4, range=(0, 400 - 16 - 22))[0]) > 40


@pytest.mark.parametrize("min_distance", [0, 40])
def test_late_needles_lie_right_before_their_question_by_their_share(min_distance: int) -> None:
    mixture = Mixture(haystacks=NOISE, late_share=0.4, num_queries=(1, 1), min_distance=min_distance)
    distances = []
    for index in range(300):
        row = training_sample(mixture, 2000, 0, index)
        name, _, asked_at = questions(row)[0]
        distances.append(asked_at - row.tokens.tobytes().index(name + b"=") - len("abc=1234.") - min_distance)
    assert min(distances) == 1
    late = sum(distance <= 32 for distance in distances)
    assert 90 < late < 160
    assert sum(distance == 1 for distance in distances) > 10


def test_chains_come_by_their_share() -> None:
    mixture = Mixture(haystacks=NOISE, chain_share=0.3)
    chains = sum(b"=" in questions(training_sample(mixture, 400, 0, index))[0][1] for index in range(300))
    assert 60 < chains < 120


@pytest.mark.parametrize(("haystack", "least", "most"), [(NOISE, 0, 0), (NEEDLES, 90, 150)])
def test_only_among_needles_names_of_few_letters_come_by_their_share(
    haystack: tuple[tuple[Haystack, float], ...], least: int, most: int
) -> None:
    mixture = Mixture(haystacks=haystack, similar_share=0.4, num_needles=(12, 12), min_distance=0)
    similar = 0
    for index in range(300):
        text = training_sample(mixture, 600, 0, index).tokens.tobytes()
        names = re.findall(rb" ([a-z]{3})=\d{4}\.", text)
        assert len(names) >= 12
        similar += len(set(b"".join(names))) <= 6
    assert least <= similar <= most


@pytest.mark.parametrize(("length", "share"), [(150, 1.0), (90, 1.0), (80, 0.0)])
def test_a_name_has_four_values_wherever_they_fit(length: int, share: float) -> None:
    mixture = Mixture(haystacks=NOISE, value_share=1.0, num_needles=(1, 2), num_queries=(1, 2), min_distance=0)
    rows = [training_sample(mixture, length, 0, index) for index in range(20)]
    assert sum(len(row.answer_spans) == 4 for row in rows) == share * len(rows)


def test_all_values_of_a_name_are_asked_for_one_after_the_other() -> None:
    mixture = Mixture(haystacks=NOISE, value_share=0.4, num_needles=(9, 9), num_queries=(8, 8), min_distance=0)
    episodes = 0
    for index in range(300):
        row = training_sample(mixture, 400, 0, index)
        told = re.findall(rb" ([a-z]{3}=\d{4})\.", row.tokens.tobytes())
        asked = re.findall(rb"\?([a-z]{3}=\d{4})\.", row.tokens.tobytes())
        assert len(set(told)) == len(told)
        if len(told) == 9:
            continue
        episodes += 1
        assert sorted(told) == sorted(asked)
        assert [name[:3] for name in asked] == [name for name in (asked[0][:3], asked[4][:3]) for _ in range(4)]
        assert len(row.answer_spans) == 8
    assert 90 < episodes < 150


@pytest.fixture
def corpus(tmp_path: Path) -> TokenCorpus:
    (tmp_path / "a.txt").write_text("".join(f"line {number} of plain text\n" for number in range(200)))
    prepare(find_sources([tmp_path / "a.txt"]), tmp_path / "out", validation=0)
    return TokenCorpus(tmp_path / "out")


def test_synthetic_rows_come_by_their_share_among_plain_ones(corpus: TokenCorpus) -> None:
    mixture = Mixture(haystacks=NOISE, corpus=corpus, synthetic_share=0.25, corpus_weight=0.5)
    rows = [training_sample(mixture, 200, 0, index) for index in range(400)]
    plain = [row for row in rows if not row.answer_spans]
    assert 260 < len(plain) < 340
    assert b"?" not in plain[0].tokens.tobytes()
    assert plain[0].loss_weights.tolist() == [0, *[0.5] * 199]
    assert len({row.tokens.tobytes() for row in plain}) > 100


def test_haystacks_come_by_their_weight() -> None:
    mixture = Mixture(haystacks=((NOISE[0][0], 3.0), (CODE[0][0], 1.0)))
    code = sum(b"=1, " in training_sample(mixture, 200, 0, index).tokens.tobytes() for index in range(400))
    assert 60 < code < 140


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"synthetic_share": 1.5}, r"synthetic_share 1\.5"),
        ({"chain_share": -1}, "chain_share -1"),
        ({"num_needles": (3, 2)}, "num_needles 3 to 2"),
        ({"num_queries": (0, 2)}, "num_queries 0 to 2"),
        ({"min_distance": -1}, "min_distance -1"),
        ({"haystacks": ()}, "without a haystack"),
        ({"task_share": 0.5}, "task_share 0.5 without a task"),
        ({"tasks": (("niah", 1.0),)}, "task 'niah'; allowed are s-niah, "),
        ({"synthetic_share": 0.5}, "without a corpus"),
        ({"min_episode": 50}, "min_episode 50; allowed is 86 or more"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Mixture(**({"haystacks": NOISE} | fields))  # type: ignore[arg-type]


def test_a_row_too_short_for_one_question_is_refused() -> None:
    mixture = Mixture(haystacks=NOISE, min_distance=64)
    training_sample(mixture, 86, 0, 0)
    with pytest.raises(InvalidArgument, match="length 85; a synthetic row takes 86 or more"):
        training_sample(mixture, 85, 0, 0)


@pytest.mark.parametrize("task", TASKS)
def test_episodes_are_samples_of_the_tasks(task: str) -> None:
    length = 2 * max(sizes(task).least, 300) + 200
    mixture = Mixture(haystacks=NOISE, task_share=1.0, tasks=((task, 1.0),), min_distance=9, min_episode=length // 2)
    for index in range(10):
        row = training_sample(mixture, length, 0, index)
        text = row.tokens.tobytes()
        begin, asked = 0, sizes(task).prompt
        for start, end in row.answer_spans:
            if text[begin : begin + 2] != b" ?":  # the first answer of an episode
                episode = begin
            assert text[start:end] in answers(text[episode : start - asked], text[start - asked : start])
            assert row.loss_weights[start : end + 1].tolist() == [1.0] * (end + 1 - start)
            begin = end + 1
        assert begin == length


def test_episodes_of_tasks_come_by_their_share() -> None:
    mixture = Mixture(haystacks=NOISE, task_share=0.3, tasks=(("qa-1", 1.0), ("vt", 0.0)), min_distance=0)
    rows = [training_sample(mixture, 500, 0, index).tokens.tobytes() for index in range(300)]
    assert 60 < sum(b" Where does " in row for row in rows) < 120


def test_a_row_in_which_no_task_fits_has_needles() -> None:
    mixture = Mixture(haystacks=NOISE, task_share=1.0, tasks=(("fwe", 1.0),), min_distance=0)
    assert questions(training_sample(mixture, 300, 0, 0))


def test_hidden_needles_cut_no_others_in_pieces() -> None:
    mixture = Mixture(
        haystacks=NEEDLES,
        num_needles=(2, 5),
        num_queries=(1, 3),
        min_distance=0,
        min_episode=150,
        late_share=0.5,
        similar_share=0.5,
        task_share=0.5,
        tasks=(("mv-niah", 1.0),),
    )
    for index in range(60):
        row = training_sample(mixture, 600, 0, index).tokens.tobytes()
        for between in re.split(rb"(?: \?[a-z]{3}=[0-9]{4}\.)+", row):
            assert re.fullmatch(rb".{0,9}(?: [a-z]{3}=[0-9]{4}\.)*.{0,9}", between), between
