"""Damages files in ways that know their format, and tells whether reading one ends as it should.

A reader gives a whole answer or raises one error of the project, in one line. It never raises another error, never
hangs and never takes much memory, whatever the file holds and though its checksums are right.
"""

import contextlib
import json
import math
import random
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hsa_compile.errors import HSACompileError, HSACompileWarning

# How many damages a test makes of each format.
COUNTS = (30, pytest.param(2000, marks=pytest.mark.exhaustive))
HANG_S = 3600  # Only against a reader that hangs for ever: no test depends on how quick a machine is.
MORE_BYTES = 1 << 30
LONGEST_LINE = 3000
DEPTH = 200_000
_DEEP = "\0 something nested very deep \0"  # is replaced in the text: no JSON encoder can write it
_HUGE = 10**400
_NOT_TO_BE_MADE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# What takes the place of a value: every type, numbers that no arithmetic stands, texts that no terminal should see.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**63), _HUGE, -_HUGE, 0.5, -0.0, 1e308, 5e-324, math.nan, math.inf,
    -math.inf, "", "0", "1", "a b", "\ud800", "\x1b[2J", "\u202e", "x\ny", "../../x", "{}", "x" * 100_000, [], {},
    [None], [[]], [0, 0], {"": None}, {"a": {"b": []}}, list(range(500)), nested(50), nested(900), _DEEP,
)  # fmt: skip
# What takes the place of a line, or comes between two.
LINES = (b"", b"[]", b"null", b"{}", b"7", b'"', b"\xff\xfe", b"\0" * 50, b"[" * DEPTH, b"x" * 100_000)


def _json_text(document: Any) -> bytes:
    return json.dumps(document, indent=1).encode()


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of file that the product writes and reads.

    Attributes:
        name: what the format is called.
        make: has the product write a valid file, in an empty directory, and returns its path.
        read: reads the file as the product does, and uses all of what it read.
        parse, render: turn the file's bytes into plain values (mappings, lists, scalars and bytes), and back.
        seal: puts the right checksums into the plain values, in place.
        settle: puts the right checksums into other files, once this one is written.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    parse: Callable[[bytes], Any] = json.loads
    render: Callable[[Any], bytes] = _json_text
    seal: Callable[[Any], object] = lambda document: None
    settle: Callable[[Path], object] = lambda path: None


def parse_lines(text: bytes) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def render_lines(document: Any) -> bytes:
    lines = document if isinstance(document, list) else [document]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def parse_tensors(data: bytes) -> Any:
    """Takes a safetensors file apart."""
    start = 8 + int.from_bytes(data[:8], "little")
    return {"length": start - 8, "header": json.loads(data[8:start]), "data": data[start:]}


def render_tensors(document: Any) -> bytes:
    header = json.dumps(document["header"]).encode()
    old = document["length"]
    length = len(header) if isinstance(old, int) and old >= 0 and old < 2**20 else abs(int(old or 0)) % 2**64
    return int(length).to_bytes(8, "little") + header + document["data"]


def damaged(form: Format, text: bytes, number: int) -> bytes:
    """Returns the content of a valid file after damage; equal numbers give equal damage."""
    chance = random.Random(f"{form.name} {number}")
    if chance.random() < 0.75:
        document = form.parse(text)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            document = _with_another_value(document, chance)
        with contextlib.suppress(*_NOT_TO_BE_MADE):  # then the old checksum stays
            form.seal(document)
        try:
            text = form.render(document)
        except _NOT_TO_BE_MADE:
            return b"[" * DEPTH
        return text.replace(json.dumps(_DEEP).encode(), b"[" * DEPTH + b"]" * DEPTH)
    return chance.choice((_with_another_line, _with_other_bytes))(text, chance)


def _with_another_value(document: Any, chance: random.Random) -> Any:
    places = list(_places(document))
    if not places:
        return _copied(chance.choice(VALUES))
    parent, key = chance.choice(places)
    how = chance.random()
    old = parent[key]
    if isinstance(old, bytes):
        parent[key] = _with_other_bytes(old, chance)
    elif how < 0.6:
        parent[key] = _copied(chance.choice(VALUES))
    elif how < 0.7:
        other, other_key = chance.choice(places)
        parent[key] = _copied(other[other_key])
    elif how < 0.8 and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = old * chance.choice((-1, 2, 3, 1000, 10**6)) + chance.choice((-1, 0, 1))
    elif how < 0.9:
        del parent[key]
    elif isinstance(parent, dict):
        parent[chance.choice(("", "unknown", str(key) + "x", "\ud800", "x" * 5000))] = parent.pop(key)
    else:
        parent.insert(chance.randrange(len(parent) + 1), _copied(old))
    return document


def _copied(value: Any) -> Any:
    return value if isinstance(value, bytes) else json.loads(json.dumps(value))


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (container, key) of every value in plain values."""
    waiting = [document]
    while waiting:
        node = waiting.pop()
        items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
        for key, value in items:
            yield node, key
            waiting.append(value)


def _with_another_line(text: bytes, chance: random.Random) -> bytes:
    lines = text.split(b"\n")
    index = chance.randrange(len(lines))
    how = chance.randrange(6)
    if how == 0:
        lines.insert(index, chance.choice(LINES))
    elif how == 1:
        lines[index] = chance.choice(LINES)
    elif how == 2:
        lines.insert(chance.randrange(len(lines) + 1), lines[index])
    elif how == 3:
        del lines[index]
    elif how == 4:
        lines[index] = lines[index][: len(lines[index]) // 2]
    else:
        chance.shuffle(lines)
    return b"\n".join(lines)


def _with_other_bytes(text: bytes, chance: random.Random) -> bytes:
    if not text:
        return bytes(chance.randrange(1, 100))
    place = chance.randrange(len(text))
    how = chance.randrange(8)
    if how == 0:
        return text[:place]
    if how == 1:
        return text[place:]
    if how == 2:
        return text + text
    if how == 3:
        return text[:place] + bytes(chance.randrange(1, 100)) + text[place:]
    if how == 4:
        return bytes(len(text))
    flipped = bytearray(text)
    for _ in range(chance.choice((1, 1, 8))):
        flipped[chance.randrange(len(text))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def check_damaged(form: Format, count: int, directory: Path) -> None:
    """Reads a file with each of so many damages; a reading may change the folder, which is as before then."""
    whole, folder = directory / "whole", directory / "folder"
    folder.mkdir()
    path = form.make(folder)
    content = path.read_bytes()
    shutil.copytree(folder, whole)
    assert why_wrong(form, path) is None, "the file as the product wrote it"
    wrong = {}
    for number in range(count):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        path.write_bytes(damaged(form, content, number))
        form.settle(path)
        if reason := why_wrong(form, path):
            wrong[number] = reason
    assert not wrong, f"{len(wrong)} of {count}, such as {dict(list(wrong.items())[:8])}"


def why_wrong(form: Format, path: Path) -> str | None:
    """Reads a file, and says what is wrong with how that ended; None if nothing is."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with _within_limits():
                form.read(path)
        except HSACompileError as error:
            told.append(f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001 (that is what is looked for)
            return f"{type(error).__name__}: {str(error)[:200]}"
    for warning in caught:
        if not issubclass(warning.category, HSACompileWarning):
            return f"a warning of another kind: {warning.category.__name__}: {str(warning.message)[:200]}"
        told.append(str(warning.message))
    for line in told:
        if len(line) > LONGEST_LINE or not line.isprintable():
            return f"no line for people: {line[:200]!r} … ({len(line)} characters)"
    return None


@contextlib.contextmanager
def _within_limits() -> Iterator[None]:
    """Turns a hang, and a gigabyte more of memory, into an error."""
    if sys.platform != "linux":
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"the reader hangs: it takes more than {HANG_S} s")

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MORE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
