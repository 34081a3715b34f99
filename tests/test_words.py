"""The words: docstrings, help texts and comments are whole sentences; none is a fragment that begins with "of"."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import hsa_compile

PACKAGE = Path(hsa_compile.__file__).parent
FIRST_WORD = re.compile(r"\W*[Oo]f\b")
COMMENT = re.compile(r"#:?\s*[Oo]f\b")
SENTENCE = re.compile(r"(^|[.:;]\s+)Of\b")
ENTRY = re.compile(r"\s*[\w*`., ]+:\s+of\b")  # "name: of …" in a list of arguments, attributes or errors


def docstring(node: ast.AST) -> ast.Constant | None:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            return first.value
    return None


def lines_of(constant: ast.Constant) -> Iterator[tuple[int, str]]:
    return enumerate(str(constant.value).splitlines(), constant.lineno)


def offences(text: str) -> Iterator[int]:
    """Yields the numbers of lines in which "of" stands where a sentence, or what an entry says, should begin."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (number for number, line in lines_of(node) if SENTENCE.search(line))
        if words := docstring(node):
            yield from (number for number, line in lines_of(words) if ENTRY.match(line))
            if FIRST_WORD.match(str(words.value)):
                yield words.lineno
    if COMMENT.search(text):  # few do, and to split a text into tokens takes long
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and COMMENT.match(token.string):
                yield token.start[0]


def test_no_docstring_help_text_or_comment_begins_with_of() -> None:
    bad = '"""of a run."""\nclass C:\n    """Runs.\n\n    Args:\n        x: of it.\n    """\n"Of it."\n0  # of it\n'
    assert set(offences(bad)) == {1, 6, 8, 9}
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{number}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for number in sorted(set(offences(path.read_text())))
    ]
    assert not found
