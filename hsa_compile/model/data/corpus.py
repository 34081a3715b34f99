"""A prepared corpus, read from its files: its documents, and rows that a seed and a number alone decide.

A row is a window at a random place, or a stretch of the shuffled documents, one behind the other (`DocumentOrder`).
"""

import bisect
import hashlib
import itertools
import os
import random
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from hsa_compile.errors import CorpusError, InvalidArgument
from hsa_compile.files import check_sha256, open_regular
from hsa_compile.model.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER_FILE,
    TRAIN,
    Manifest,
    ends_name,
    find_shards,
    join_manifests,
    tokens_name,
)
from hsa_compile.model.data.tokenizer import BYTES, TokenArray, Tokenizer, load_tokenizer

_BLOCK = 1 << 20  # how many ends of documents are checked at a time


class NumberFile:
    """The numbers in a file, read when they are asked for; a slice gives an array of its own that cannot be written.

    Nothing is mapped, since a file that is cut while it is mapped would end the process instead of raising an error.
    The file stays readable after it was removed or replaced.

    Args:
        path: the file.
        dtype: the dtype of its numbers.
        count: how many there must be.
        limit: the numbers that are read must be below it; None if all of the dtype are allowed.

    Raises:
        CorpusError: the file cannot be read or has another size; a slice raises it too, also for a number that is not
            below the limit.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], count: int, limit: int | None = None) -> None:
        self.path, self.dtype, self._count, self._limit = path, dtype, count, limit
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._file)
        self._check_size()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: slice) -> npt.NDArray[Any]:
        first, last, _ = index.indices(self._count)
        size, data = max(last - first, 0) * self.dtype.itemsize, b""
        try:
            while more := os.pread(self._file, size - len(data), first * self.dtype.itemsize + len(data)):
                data += more  # more than 2 GiB come in parts
        except OSError as error:
            raise CorpusError(f"{self.path} cannot be read: {error.strerror}") from error
        if len(data) < size:
            self._check_size()
        numbers = np.frombuffer(data, self.dtype)
        if self._limit is not None and size and int(numbers.max()) >= self._limit:
            place = first + int(np.flatnonzero(numbers >= self._limit)[0])
            raise CorpusError(
                f"{self.path} is damaged: token {place} is {numbers[place - first]}; the vocabulary has {self._limit}"
            )
        return numbers

    def _check_size(self) -> None:
        size, told = os.fstat(self._file).st_size, self._count * self.dtype.itemsize
        if size != told:
            raise CorpusError(f"{self.path} has {size} bytes, its manifest says {told}; prepare it again")


class NumberFiles:
    """The numbers of several files, one file behind the other, read as those of a `NumberFile` are.

    Args:
        files: the files, at least one, all of one dtype.
        added: what is added to the numbers of each file; None for nothing.
    """

    def __init__(self, files: Sequence[NumberFile], added: Sequence[int] | None = None) -> None:
        self._files, self._added, self.dtype = list(files), added, files[0].dtype
        self._bounds = [0, *itertools.accumulate(len(file) for file in files)]

    def __len__(self) -> int:
        return self._bounds[-1]

    def __getitem__(self, index: slice) -> npt.NDArray[Any]:
        first, last, _ = index.indices(len(self))
        number = bisect.bisect_right(self._bounds, first, hi=len(self._files)) - 1
        found = []
        while True:  # also for an empty slice, so that its dtype is right
            start = self._bounds[number]
            part = self._files[number][max(first - start, 0) : max(last - start, 0)]
            found.append(part + self._added[number] if self._added is not None else part)
            number += 1
            if number == len(self._files) or last <= self._bounds[number]:
                return found[0] if len(found) == 1 else np.concatenate(found)


class TokenCorpus:
    """One split of a prepared corpus; of its files only the ends of documents are read before they are asked for.

    A corpus may have several shards: folders that were each prepared on their own, with the same settings, beside each
    other in one folder. They are read as one, in the order of their names.

    Args:
        directory: the folder that `hsa-compile prepare` wrote, or one that holds such folders and nothing else.
        split: `train` or `validation`.
        checksum: whether to compare the files with the manifest's SHA-256, which reads them once.

    Attributes:
        tokens: `[num_tokens]` of uint8, uint16 or uint32, read in slices; every document is followed by the separator.

    Raises:
        CorpusError: there is no manifest or it is damaged, or a file is missing, has another size or another checksum,
            or has documents that do not follow each other. Reading raises it if a file was cut meanwhile, or holds a
            token that is not in the vocabulary.
        InvalidArgument: there is no such split.
    """

    def __init__(self, directory: str | Path, *, split: str = TRAIN, checksum: bool = False) -> None:
        if split not in SPLITS:
            raise InvalidArgument(f"split {split!r}; allowed are {', '.join(SPLITS)}")
        self.directory, self.split = Path(directory), split
        shards = find_shards(self.directory)
        self.manifest = join_manifests(shards)
        opened = [_open_split(folder, manifest, split, checksum) for folder, manifest in shards.items()]
        self.tokens = NumberFiles([tokens for tokens, _ in opened])
        before = itertools.accumulate((len(tokens) for tokens, _ in opened), initial=0)
        self._ends = NumberFiles([ends for _, ends in opened], list(before)[:-1])
        self._first_shard = next(iter(shards))
        if find_shards(self.directory) != shards:
            raise CorpusError(f"{self.directory} was prepared anew while it was opened; open it again")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def has_bytes(self) -> bool:
        """Whether the tokens are bytes, and not those of a tokenizer that may have as few."""
        return self.manifest.settings.tokenizer_digest == BYTES

    @property
    def ends(self) -> npt.NDArray[np.int64]:
        """Where each document ends, its separator included, `[num_documents]`."""
        return self._ends[:]

    @property
    def documents(self) -> "Documents":
        """All documents of the split, in the order of their sources and without separators."""
        return Documents(self.tokens, self._ends, self.manifest.separator is not None)

    def sample(self, index: int, length: int, *, seed: int = 0) -> TokenArray:
        """Returns a random window, the same for the same (seed, index, length) in every process.

        Returns:
            `[length]`, read-only, with documents and their separators as they come.

        Raises:
            InvalidArgument: the split has fewer tokens.
        """
        if not 1 <= length <= len(self.tokens):
            allowed = f"1 to {len(self.tokens)}" if len(self.tokens) else f"none: {self.split} is empty"
            raise InvalidArgument(f"length {length} in {self.directory}; allowed are {allowed}")
        start = random.Random(f"window {seed} {index}").randrange(len(self.tokens) - length + 1)
        return self.tokens[start : start + length]

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that the corpus was prepared with.

        Raises:
            CorpusError: the tokenizer's file is not the same any more.
        """
        settings = self.manifest.settings
        is_bytes = settings.tokenizer_digest == BYTES
        found = load_tokenizer(BYTES if is_bytes else self._first_shard / TOKENIZER_FILE)
        if found.digest != settings.tokenizer_digest:
            raise CorpusError(f"{self._first_shard / TOKENIZER_FILE} is not the tokenizer of this corpus")
        return found


class Documents(Sequence[TokenArray]):
    """The documents of a split as a sequence; each is read when it is asked for."""

    def __init__(self, tokens: NumberFiles, ends: NumberFiles, has_separator: bool) -> None:
        self._tokens, self._ends, self._separators = tokens, ends, int(has_separator)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> TokenArray: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenArray]: ...
    def __getitem__(self, index: int | slice) -> TokenArray | list[TokenArray]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        start, end = (0, *self._ends[:1]) if at == 0 else self._ends[at - 1 : at + 1]
        return self._tokens[int(start) : int(end) - self._separators]

    def __iter__(self) -> Iterator[TokenArray]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """How many tokens each document has, `[num_documents]`, without separators."""
        return np.diff(self._ends[:], prepend=np.int64(0)) - self._separators


def _open_split(folder: Path, manifest: Manifest, split: str, checksum: bool) -> tuple[NumberFile, NumberFile]:
    """Opens the tokens and the ends of documents of one prepared folder."""
    summary, vocab_size, dtype = manifest.splits[split], manifest.vocab_size, np.dtype(manifest.dtype).newbyteorder("<")
    tokens = NumberFile(
        folder / tokens_name(split), dtype, summary.tokens, None if vocab_size > np.iinfo(dtype).max else vocab_size
    )
    ends = NumberFile(folder / ends_name(split), np.dtype("<i8"), summary.documents)
    _check_ends(ends, summary.tokens, int(manifest.separator is not None))
    if checksum:
        source = f"{MANIFEST}; prepare the corpus again"
        check_sha256(tokens.path, summary.tokens_sha256, source, error=CorpusError)
        check_sha256(ends.path, summary.ends_sha256, source, error=CorpusError)
    return tokens, ends


def _check_ends(ends: NumberFile, num_tokens: int, separators: int) -> None:
    """Checks that each document ends behind the one before, and the last one with the tokens."""
    last = 0
    for start in range(0, len(ends), _BLOCK):
        block = ends[max(start - 1, 0) : start + _BLOCK]
        if block[0] < separators or (np.diff(block) < separators).any():
            raise CorpusError(f"{ends.path} is damaged: a document ends before it begins; prepare the corpus again")
        last = int(block[-1])
    if last != num_tokens:
        raise CorpusError(
            f"{ends.path} is damaged: the last document does not end with the tokens; prepare the corpus again"
        )


class DocumentOrder:
    """All documents of a split, shuffled, one behind the other with their separators: a stream without end.

    Each epoch has all documents once, in an order of its own. The stream can be read from any place, and nothing needs
    to be remembered for that. It holds 24 bytes for each document; of the text, only what is asked for is read.

    Args:
        corpus: the split, which is not empty.
        seed: the seed of the order.
    """

    def __init__(self, corpus: TokenCorpus, *, seed: int) -> None:
        self._corpus, self._seed = corpus, seed
        self._ends = corpus.ends  # [num_documents] int64, where each document ends in the files
        self._epoch = -1

    def read(self, place: int, length: int) -> TokenArray:
        """Returns `length` tokens from the one with the number `place` on; it is the same in every process."""
        found = [np.empty(0, self._corpus.tokens.dtype)]
        while length:
            epoch, at = divmod(place, len(self._corpus))
            self._shuffle(epoch)
            number = int(np.searchsorted(self._places, at, side="right"))
            left = int(self._places[number]) - at  # tokens of the document that are not passed
            end = int(self._ends[self._order[number]])
            found.append(self._corpus.tokens[end - left : end - left + min(left, length)])
            place, length = place + len(found[-1]), length - len(found[-1])
        return np.concatenate(found)

    def _shuffle(self, epoch: int) -> None:
        """Makes the order of an epoch: which document comes when, and where each one ends in the epoch."""
        if epoch == self._epoch:
            return
        self._order = _shuffled(len(self._ends), f"documents {self._seed} {epoch}")
        self._places = np.diff(self._ends, prepend=np.int64(0))[self._order].cumsum()
        self._epoch = epoch


def _shuffled(count: int, name: str) -> npt.NDArray[np.int64]:
    """Returns the numbers below `count` in the order of a hash of them, by SplitMix64 (OOPSLA 2014).

    NumPy does not promise that its own generators stay the same from version to version.
    """
    x = np.arange(count, dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingSample:
    """One row to train on.

    Attributes:
        tokens: `[length]`, unsigned integers.
        loss_weights: `[length]` float32, what the prediction of `tokens[i]` from `tokens[:i]` counts in the loss;
            that of the first token is 0.
        answer_spans: (start, end) of the answers to questions; none in plain text.
    """

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    loss_weights: npt.NDArray[np.float32]
    answer_spans: tuple[tuple[int, int], ...] = ()


def plain_sample(tokens: TokenArray, weight: float = 1.0) -> TrainingSample:
    """Makes a row of plain text; all its tokens but the first count the same."""
    loss_weights = np.full(len(tokens), weight, np.float32)
    loss_weights[0] = 0
    return TrainingSample(tokens=tokens, loss_weights=loss_weights)
