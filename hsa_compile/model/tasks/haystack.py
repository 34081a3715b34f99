"""What needles are hidden in: repeated sentences, random words, other needles, real text, or pieces of it.

All but text is made from a seed by Python's generator and whole numbers alone, so that it is the same everywhere.
"""

import contextlib
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hsa_compile.errors import InvalidArgument, UnreadableSource
from hsa_compile.model.data.corpus import NumberFiles, TokenCorpus
from hsa_compile.model.data.documents import Source, find_sources, read_documents
from hsa_compile.model.data.manifest import MANIFEST, TRAIN
from hsa_compile.model.data.prepare import stdlib_corpus
from hsa_compile.model.tasks.facts import LETTERS, NEEDLE_BYTES, NUM_KEYS, NUM_VALUES, WORD_BYTES

NOISE, WORDS, NEEDLES, FREQUENT = "noise", "words", "needles", "frequent"
TEXT = "text"  # stands for whichever real text was chosen
STDLIB = "stdlib"
SEPARATOR = b"\0"
# The sentences are those of RULER (2404.06654), niah_single_1.
_SENTENCES = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
MAX_TEXT_BYTES = 64 * 2**20
_PIECE_BYTES = 64
_BLOCK = 2**22
_TILED = _SENTENCES * 256
_VOCABULARY = 256


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


class WordHaystack:
    """Gives words of random letters, hardly one of which comes twice."""

    name = WORDS

    def fill(self, length: int, rng: random.Random) -> bytearray:
        """Returns words, cut off at both ends."""
        count = length // (WORD_BYTES + 1) + 2
        return _cut(_words(rng, count), length, rng)


class FrequencyHaystack:
    """Gives words of a small vocabulary, the second a quarter as often as the first, the third a ninth, and so on.

    The shares are exact, up to rounding, so that no two of the most frequent words are equally frequent.
    """

    name = FREQUENT

    def fill(self, length: int, rng: random.Random) -> bytearray:
        """Returns words in random order, cut off at both ends."""
        count = length // (WORD_BYTES + 1) + 2
        words = _words(rng, _VOCABULARY)
        weights = 1 / np.arange(1, _VOCABULARY + 1) ** 2
        ends = np.ceil(count * np.cumsum(weights) / weights.sum())
        ranks = np.searchsorted(ends, np.arange(count), side="right").astype(np.uint8)
        return _cut(words[ranks[_shuffled(rng, count)]], length, rng)


class NeedleHaystack:
    """Gives needles alone, all of which look like the one that is asked for.

    Each filling leaves out an eighth of the names and of the values, at random, so that some are left to be hidden.
    """

    name = NEEDLES

    def fill(self, length: int, rng: random.Random) -> bytearray:
        """Returns needles, cut off at both ends."""
        count = length // NEEDLE_BYTES + 2
        keys, values = _most(rng, NUM_KEYS, count), _most(rng, NUM_VALUES, count)
        letters = np.frombuffer(LETTERS, np.uint8)
        columns: list[int | npt.NDArray[Any]] = [
            ord(" "),
            letters[keys // 676],
            letters[keys // 26 % 26],
            letters[keys % 26],
            ord("="),
        ]
        columns += [ord("0") + values // 10**power % 10 for power in (3, 2, 1, 0)] + [ord(".")]
        rows = np.empty((count, NEEDLE_BYTES), np.uint8)
        for number, column in enumerate(columns):
            rows[:, number] = column
        return _cut(rows, length, rng)


def grid_of(haystack: Haystack, text: bytes | bytearray) -> range:
    """Returns where in a filled text needles may begin: anywhere, but among other needles only where those begin.

    A needle that lay across two others would be told from all others by the pieces beside it, without its name.
    """
    if haystack.name != NEEDLES:
        return range(len(text))
    return range(text.find(b" ") % NEEDLE_BYTES, len(text), NEEDLE_BYTES)


def _words(rng: random.Random, count: int) -> npt.NDArray[np.uint8]:
    """Draws `count` words with a blank behind each; two bytes a letter make all equally likely, but for 0.04 %."""
    drawn = np.frombuffer(rng.randbytes(2 * count * WORD_BYTES), "<u2") % len(LETTERS)
    rows = np.full((count, WORD_BYTES + 1), ord(" "), np.uint8)
    rows[:, :-1] = np.frombuffer(LETTERS, np.uint8)[drawn].reshape(count, WORD_BYTES)
    return rows


def _shuffled(rng: random.Random, count: int) -> npt.NDArray[np.int64]:
    """Returns the numbers below `count` in random order."""
    return np.argsort(np.frombuffer(rng.randbytes(8 * count), "<u8"), kind="stable")


def _most(rng: random.Random, size: int, count: int) -> npt.NDArray[np.int64]:
    """Draws `count` of the numbers below `size`, with repetition, out of seven eighths of them."""
    allowed = _shuffled(rng, size)[: size * 7 // 8]
    return allowed[np.frombuffer(rng.randbytes(4 * count), "<u4") % len(allowed)]


def _cut(rows: npt.NDArray[np.uint8], length: int, rng: random.Random) -> bytearray:
    start = rng.randrange(rows.shape[1])
    return bytearray(rows.reshape(-1)[start : start + length].data)


MADE: Mapping[str, Haystack] = {
    haystack.name: haystack for haystack in (NoiseHaystack(), WordHaystack(), FrequencyHaystack(), NeedleHaystack())
}


class TextHaystack:
    """Gives windows of a text; one that is longer than the text goes on at its beginning.

    Args:
        name: the name that is printed beside results.
        text: bytes, or a file of them, not empty; they are never written to.
        origin: plain values that say what the text is made of.
    """

    def __init__(self, name: str, text: bytes | NumberFiles, origin: Mapping[str, Any] | None = None) -> None:
        self.name, self._text, self.origin = name, text, dict(origin or {})
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

    def __init__(self, name: str, text: bytes | NumberFiles) -> None:
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
    return TextHaystack(corpus.directory.name, _bytes_of(corpus), {"split": corpus.split})


def _bytes_of(corpus: TokenCorpus) -> NumberFiles:
    if not corpus.has_bytes:
        tokenizer = corpus.manifest.settings.tokenizer
        raise InvalidArgument(f"{corpus.directory} has tokenizer {tokenizer}; a haystack needs the tokenizer bytes")
    return corpus.tokens


def load_haystack(spec: str | Path, *, split: str = TRAIN) -> TextHaystack:
    """Opens the text that a person named.

    Args:
        spec: `stdlib`, the corpus of the Python standard library's sources; a prepared corpus of bytes; or a folder or
            file of text, JSONL or Parquet, whose first 64 MiB are used.
        split: which split of a prepared corpus is read.

    Raises:
        InvalidArgument: nothing has that name, or it holds no text.
    """
    if spec == STDLIB:
        return TextHaystack(STDLIB, _bytes_of(stdlib_corpus(split)), {"split": split})
    if (Path(spec) / MANIFEST).exists():
        return corpus_haystack(TokenCorpus(spec, split=split))
    return TextHaystack(Path(spec).name, _joined(find_sources([spec])))


def _joined(sources: list[Source]) -> bytes:
    """Joins all documents, each followed by byte 0 as in a prepared corpus, up to the limit."""
    parts: list[bytes] = []
    size = 0
    for source in sources:
        for document in documents_of(source):
            parts += (document, SEPARATOR)
            size += len(document) + 1
            if size >= MAX_TEXT_BYTES:
                return b"".join(parts)[:MAX_TEXT_BYTES]
    return b"".join(parts)


def documents_of(source: Source) -> Iterator[bytes]:
    """Yields documents up to where a source breaks off; `hsa-compile prepare` is where bad files are named."""
    with contextlib.suppress(UnreadableSource):
        yield from (item for item in read_documents(source) if isinstance(item, bytes))
