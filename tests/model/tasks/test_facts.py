"""Names, needles and questions before they are placed."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.tasks.facts import (
    CHAIN_QUERY_BYTES,
    NEEDLE_BYTES,
    QUERY_BYTES,
    chain_facts,
    copied_values,
    draw_keys,
    few_letters,
    lookup_facts,
)

LETTERS = range(97, 123)
NAMES = [b"%c%c%c" % (a, b, c) for a in LETTERS for b in LETTERS for c in LETTERS]


@given(seed=st.integers(0, 10**6), count=st.integers(1, 20))
def test_names_that_the_text_assigns_to_are_not_drawn(seed: int, count: int) -> None:
    free = set(NAMES[::2])
    text = b", ".join(b"long_%b=1" % name for name in NAMES[1::2])
    keys = draw_keys(random.Random(seed), count, text)
    assert len(set(keys)) == count
    assert set(keys) <= free


@given(seed=st.integers(0, 10**6), length=st.integers(1, 10**5))
def test_few_letters_leave_names_for_as_many_needles_as_fit(seed: int, length: int) -> None:
    rng = random.Random(seed)
    letters = few_letters(rng, length)
    assert len(set(letters)) == len(letters) >= 6
    assert len(letters) == 26 or 4 * len(letters) ** 3 >= length
    assert len(letters) == 6 or 4 * (len(letters) - 1) ** 3 < length
    count = min(length // (2 * NEEDLE_BYTES) + 1, 1000)
    told, asked = (draw_keys(rng, count, b"", letters) for _ in range(2))
    left = draw_keys(rng, count, b"".join(b" %b=1234." % name for name in told), letters)
    assert not set(left) & set(told)
    assert set(b"".join((*asked, *left))) <= set(letters)


def test_a_thousand_needles_are_the_most() -> None:
    assert len(set(draw_keys(random.Random(0), 1000, b""))) == 1000
    with pytest.raises(InvalidArgument, match="1001 needles; allowed are 1 to 1000"):
        draw_keys(random.Random(0), 1001, b"")


def test_a_lookup_reads_as_documented() -> None:
    facts = lookup_facts(random.Random(0), [b"abc", b"def"], 2)
    first, second = (needle[5:9] for needle in facts.needles)
    assert facts.needles == (b" abc=%b." % first, b" def=%b." % second)
    text, spans = facts.question.text, facts.question.answer_spans
    assert text == b" ?abc=%b. ?def=%b." % (first, second)
    assert [text[start:end] for start, end in spans] == [first, second]
    assert first != second
    assert (len(facts.needles[0]), len(text)) == (NEEDLE_BYTES, 2 * QUERY_BYTES)


def test_a_chain_reads_as_documented() -> None:
    facts = chain_facts(random.Random(0), [b"abc", b"def", b"ghi", b"jkl", b"mno", b"pqr"], 2)
    first, second = facts.needles[0][5:9], facts.needles[3][5:9]
    assert facts.needles[:3] == (b" abc=%b." % first, b" def=abc.", b" ghi=def.")
    text, spans = facts.question.text, facts.question.answer_spans
    assert text == b" ?ghi=def=abc=%b. ?pqr=mno=jkl=%b." % (first, second)
    assert text[slice(*spans[1])] == b"mno=jkl=%b" % second
    assert len(text) == 2 * CHAIN_QUERY_BYTES
    assert facts.asked == (0, 1, 2, 3, 4, 5)


def test_each_value_of_an_answer_is_copied_from_the_needle_of_its_name() -> None:
    text = b"gxe=1. lvp=3214. some=3214. gxe=lvp. 77=5 ?gxe=lvp=3214. ?abc=3214. Where? 3214."
    spans = [(text.index(b"lvp=3214.", 40), text.index(b". ?abc")), (text.index(b"3214. W"), text.index(b". W"))]
    spans.append((len(text) - 5, len(text) - 1))
    found = list(copied_values(text, spans))
    assert [(text[a : a + n], text[b : b + n]) for a, b, n in found] == [(b"lvp", b"lvp"), (b"3214.", b"3214.")]
    assert [text[b - 4 : b] for _, b, _ in found] == [b"gxe=", b"lvp="]


def test_a_text_may_begin_with_an_answer() -> None:
    assert list(copied_values(b"1234. abc=1234.", [(0, 4)])) == []
