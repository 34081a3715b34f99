"""A contender of the user's own is found, or one line says what is wrong with it."""

from pathlib import Path

import pytest

from hsa_compile.comparison import BOTH, DECODE, FORWARD, KINDS, SELECT
from hsa_compile.comparison.contender import SAME
from hsa_compile.comparison.contenders import load_contender
from hsa_compile.errors import InvalidArgument

SOURCE = """
def attention(q, k, v, chunk_indices, chunk_weights, *, chunk_size):
    return q

def selection(query, landmarks, chunk_size, top_k):
    return query

def decoding(q, k_chunks, v_chunks, chunk_indices, chunk_weights, page_table=None):
    return q

def anything(*tensors, **options):
    return tensors[0]

def other(q, k, v):
    return q

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("attention", (FORWARD, BOTH)),
        ("selection", (SELECT,)),
        ("decoding", (DECODE,)),
        ("anything", tuple(KINDS)),
    ],
)
def test_a_function_enters_where_it_can_be_called_as_the_op(file: Path, name: str, kinds: tuple[str, ...]) -> None:
    contender = load_contender(f"{file}:{name}", list(KINDS))
    assert contender.name == f"mine.py:{name}"
    assert contender.computes == SAME
    assert contender.kinds == kinds


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{file}:nothing", "has no function 'nothing'; it has attention, selection, decoding, anything, other"),
        ("{file}:number", "has no function 'number'"),
        ("{file}:other", r"takes \(q, k, v\), which is none of what is timed"),
        ("{file}.txt:attention", "there is no file"),
        ("{file}", "is not FILE.py:function"),
        ("attention", "is not FILE.py:function"),
        (":attention", "is not FILE.py:function"),
    ],
)
def test_what_is_not_there_is_named(file: Path, text: str, reason: str) -> None:
    text = text.format(file=file)
    if text == str(file):
        text = text.replace(":", "")
    with pytest.raises(InvalidArgument, match=reason):
        load_contender(text, list(KINDS))


def test_a_function_of_another_op_than_is_asked_for_is_refused(file: Path) -> None:
    with pytest.raises(InvalidArgument, match="none of what is timed"):
        load_contender(f"{file}:selection", [FORWARD])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named"),
        ("def attention(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_cannot_be_imported_says_why(tmp_path: Path, source: str, reason: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(InvalidArgument, match=rf"broken.py cannot be imported: {reason}"):
        load_contender(f"{path}:attention", [FORWARD])
