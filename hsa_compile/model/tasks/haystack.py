"""What needles are hidden in: RULER's noise sentences, real text, or pieces of it that look like needles."""

import contextlib
import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from hsa_compile.errors import InvalidArgument, UnreadableSource
from hsa_compile.model.data.corpus import NumberFile, TokenCorpus
from hsa_compile.model.data.documents import Source, find_sources, read_documents, stdlib_sources
from hsa_compile.model.data.manifest import MANIFEST, TRAIN

NOISE, STDLIB = "noise", "stdlib"
SEPARATOR = b"\0"
# The sentences are those of RULER (2404.06654), niah_single_1.
_SENTENCES = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_MAX_TEXT_BYTES = 64 * 2**20
_PIECE_BYTES = 64
_BLOCK = 2**22
_TILED = _SENTENCES * 256


class Haystack(Protocol):
    """A supply of bytes to hide needles in.

    Attributes:
        name: the name that is printed beside results.
    """

    name: str

    def fill(self, length: int, rng: random.Random) -> bytearray:
        """Returns `length` bytes that nobody else holds, decided by `rng` alone."""


class NoiseHaystack:
    """Repeats RULER's five sentences, from a random place on."""

    name = NOISE

    def fill(self, length: int, rng: random.Random) -> bytearray:
        """Returns sentences, cut off at both ends."""
        start = rng.randrange(len(_SENTENCES))
        if start + length <= len(_TILED):
            return bytearray(_TILED[start : start + length])
        filled = bytearray(_SENTENCES * (-(-(start + length) // len(_SENTENCES))))
        return filled[start : start + length]


class TextHaystack:
    """Gives windows of a text; one that is longer than the text goes on at its beginning.

    Args:
        name: the name that is printed beside results.
        text: bytes, or a file of them, not empty; they are never written to.
    """

    def __init__(self, name: str, text: bytes | NumberFile) -> None:
        self.name, self._text = name, text
        if not len(self._text):
            raise InvalidArgument(f"haystack {name} holds no text")

    def __len__(self) -> int:
        return len(self._text)

    def fill(self, length: int, rng: random.Random) -> bytearray:
        """Returns a window from a random place."""
        size = len(self._text)
        start = rng.randrange(size - length + 1 if length <= size else size)
        filled = bytearray(self._text[start : start + length])
        while len(filled) < length:
            filled += bytes(self._text[: length - len(filled)])
        return filled


class AssignmentHaystack:
    """Gives short pieces of a text that hold an `=` each; among them are all ways to look like a needle and be none.

    In a row of training there is little of that; a million bytes of source code hold thousands of times as much.

    Args:
        name: the name that is printed beside results.
        text: bytes, or a file of them; they are never written to.

    Raises:
        InvalidArgument: the text has no `=`.
    """

    def __init__(self, name: str, text: bytes | NumberFile) -> None:
        self.name, self._text = name, text
        starts = range(0, len(text), _BLOCK)
        blocks = (np.frombuffer(text[start : start + _BLOCK], np.uint8) for start in starts)
        found = [start + np.flatnonzero(block == ord("=")) for start, block in zip(starts, blocks, strict=True)]
        self._places = np.concatenate([np.empty(0, np.int64), *found])
        if not len(self._places):
            raise InvalidArgument(f"haystack {name} of assignments: the text has no '='")

    def fill(self, length: int, rng: random.Random) -> bytearray:
        """Returns pieces from random places, one after the other."""
        filled = bytearray()
        while len(filled) < length:
            place = int(self._places[rng.randrange(len(self._places))])
            start = max(0, place - rng.randrange(_PIECE_BYTES))
            filled += bytes(self._text[start : start + _PIECE_BYTES])
        return filled[:length]


def assignment_haystack(corpus: TokenCorpus) -> AssignmentHaystack:
    """Makes a haystack of pieces of a prepared corpus of bytes.

    Raises:
        InvalidArgument: the tokens are no bytes, or none is an `=`.
    """
    return AssignmentHaystack(f"{corpus.directory.name} assignments", _bytes_of(corpus))


def corpus_haystack(corpus: TokenCorpus) -> TextHaystack:
    """Makes a haystack of the text of a prepared corpus of bytes, which stays on disk.

    Raises:
        InvalidArgument: the tokens are no bytes.
    """
    return TextHaystack(corpus.directory.name, _bytes_of(corpus))


def _bytes_of(corpus: TokenCorpus) -> NumberFile:
    if corpus.tokens.dtype != np.uint8:
        raise InvalidArgument(f"{corpus.directory} holds {corpus.tokens.dtype}; a haystack needs the tokenizer bytes")
    return corpus.tokens


def load_haystack(spec: str | Path, *, split: str = TRAIN) -> Haystack:
    """Opens the haystack that a person named.

    Args:
        spec: `noise`; `stdlib`, the Python standard library's sources; a prepared corpus of bytes; or a folder or file
            of text, JSONL or Parquet, whose first 64 MiB are used.
        split: which split of a prepared corpus is read.

    Raises:
        InvalidArgument: nothing has that name, or it holds no text.
    """
    if spec == NOISE:
        return NoiseHaystack()
    if spec == STDLIB:
        return _stdlib()
    if (Path(spec) / MANIFEST).exists():
        return corpus_haystack(TokenCorpus(spec, split=split))
    return TextHaystack(Path(spec).name, _joined(find_sources([spec])))


@functools.cache
def _stdlib() -> TextHaystack:
    return TextHaystack(STDLIB, _joined(stdlib_sources()))


def _joined(sources: list[Source]) -> bytes:
    """Joins all documents, each followed by byte 0 as in a prepared corpus, up to the limit."""
    parts: list[bytes] = []
    size = 0
    for source in sources:
        for document in _usable(source):
            parts += (document, SEPARATOR)
            size += len(document) + 1
            if size >= _MAX_TEXT_BYTES:
                return b"".join(parts)[:_MAX_TEXT_BYTES]
    return b"".join(parts)


def _usable(source: Source) -> Iterator[bytes]:
    """Yields documents up to where a source breaks off; `hsa-compile prepare` is where bad files are named."""
    with contextlib.suppress(UnreadableSource):
        yield from (item for item in read_documents(source) if isinstance(item, bytes))
