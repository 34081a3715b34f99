"""Haystacks: noise, text, and what a person may name."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.corpus import TokenCorpus
from hsa_compile.model.data.documents import find_sources
from hsa_compile.model.data.prepare import prepare
from hsa_compile.model.tasks.facts import draw_keys
from hsa_compile.model.tasks.haystack import (
    MADE,
    AssignmentHaystack,
    FrequencyHaystack,
    NeedleHaystack,
    NoiseHaystack,
    TextHaystack,
    WordHaystack,
    load_haystack,
)
from hsa_compile.model.tasks.mixture import Mixture

CIRCLE = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


@given(st.integers(0, 60_000), st.integers(0, 1000))
def test_noise_is_rulers_sentences_over_and_over(length: int, seed: int) -> None:
    filled = NoiseHaystack().fill(length, random.Random(seed))
    assert len(filled) == length
    assert bytes(filled) in CIRCLE * (length // len(CIRCLE) + 2)


@given(st.binary(min_size=1, max_size=50), st.integers(0, 200), st.integers(0, 1000))
def test_text_is_a_window_that_goes_on_at_the_beginning(text: bytes, length: int, seed: int) -> None:
    filled = TextHaystack("text", text).fill(length, random.Random(seed))
    assert len(filled) == length
    assert bytes(filled) in text * (length // len(text) + 2)
    assert length > len(text) or bytes(filled) in text


def test_a_haystack_gives_memory_of_its_own() -> None:
    haystack = TextHaystack("text", b"0123456789")
    haystack.fill(10, random.Random(0))[0] = 120
    assert haystack.fill(10, random.Random(0)) == b"0123456789"


@given(st.lists(st.integers(0, 900), min_size=1), st.integers(0, 300), st.integers(0, 1000))
def test_assignments_are_pieces_with_an_equals_sign_each(places: list[int], length: int, seed: int) -> None:
    text = bytearray(index % 61 for index in range(1000))  # 61 is the sign itself
    for place in places:
        text[place] = ord("=")
    filled = bytes(AssignmentHaystack("code", bytes(text)).fill(length, random.Random(seed)))
    assert len(filled) == length
    pieces = [filled[start : start + 64] for start in range(0, length, 64)]
    assert all(piece in text for piece in pieces)
    assert all(b"=" in piece for piece in pieces if len(piece) == 64)


def test_assignments_come_from_all_over_the_text() -> None:
    text = b"".join(b"%08d=" % number for number in range(100))
    filled = bytes(AssignmentHaystack("code", text).fill(50_000, random.Random(0)))
    assert all(b"%08d" % number in filled for number in range(100))


def test_no_text_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="none holds no text"):
        TextHaystack("none", b"")
    with pytest.raises(InvalidArgument, match="prose of assignments: the text has no '='"):
        AssignmentHaystack("prose", b"There and back again.")


@given(st.sampled_from(sorted(MADE)), st.integers(0, 3000), st.integers(0, 1000))
def test_made_haystacks_have_their_length_and_depend_on_the_seed_alone(name: str, length: int, seed: int) -> None:
    filled = MADE[name].fill(length, random.Random(seed))
    assert len(filled) == length
    assert filled == MADE[name].fill(length, random.Random(seed))
    # The sentences of the noise begin at one of ninety places, so that two seeds may give the same.
    others = (MADE[name].fill(length, random.Random(other)) for other in range(seed + 1, seed + 11))
    assert length < 100 or any(other != filled for other in others)


def test_words_are_five_letters_and_hardly_one_comes_twice() -> None:
    words = bytes(WordHaystack().fill(60_000, random.Random(0))).split()[1:-1]
    assert all(re.fullmatch(rb"[a-z]{5}", word) for word in words)
    assert len(words) - len(set(words)) < 20
    assert len({letter for word in words for letter in word}) == 26


def test_the_most_frequent_words_are_so_by_far() -> None:
    for seed in range(20):
        words = bytes(FrequencyHaystack().fill(2048, random.Random(seed))).split()
        first, second, third, fourth = (count for _, count in Counter(words).most_common(4))
        assert min(first - second, second - third, third - fourth) > 5  # a question takes the place of five words


def test_a_haystack_of_needles_leaves_names_and_values_for_others() -> None:
    text = bytes(NeedleHaystack().fill(1_000_000, random.Random(0)))
    found = re.findall(rb" ([a-z]{3})=(\d{4})\.", text)
    assert len(found) == 99_999
    names, values = map(set, zip(*found, strict=True))
    assert 15_300 < len(names) <= 26**3 * 7 // 8
    assert len(values) == 8750
    assert all(key not in names for key in draw_keys(random.Random(0), 100, text))


def test_a_folder_of_text_is_a_haystack_without_its_binaries(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n{"text": "third"}\n')
    (tmp_path / "c.bin").write_bytes(b"\0\1")
    assert load_haystack(tmp_path).fill(19, random.Random(0)) == b"first\0second\0third\0"


def test_a_prepared_corpus_is_a_haystack(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    prepare(find_sources([tmp_path / "a.txt"]), tmp_path / "corpus", validation=0)
    haystack = load_haystack(tmp_path / "corpus")
    assert (haystack.name, haystack.fill(6, random.Random(0))) == ("corpus", b"first\0")


@pytest.mark.parametrize("num_words", [30, 300])  # their ids take as many bytes as a byte, or more
def test_a_corpus_of_words_is_no_haystack(num_words: int, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{number}": number for number in range(num_words)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0")).save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "w1"}))
    prepare(find_sources([tmp_path / "a.jsonl"]), tmp_path / "out", tokenizer=tmp_path / "t.json", validation=0)
    with pytest.raises(InvalidArgument, match=r"has tokenizer .*t\.json; a haystack needs the tokenizer bytes"):
        load_haystack(tmp_path / "out")
    corpus = TokenCorpus(tmp_path / "out")
    with pytest.raises(InvalidArgument, match="synthetic rows are bytes; the corpus needs the tokenizer bytes"):
        Mixture(haystacks=((NoiseHaystack(), 1.0),), corpus=corpus, synthetic_share=0.5)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="source essays does not exist"):
        load_haystack("essays")
