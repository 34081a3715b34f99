"""A question about needles in a haystack, as edits of the haystack and as the bytes that result."""

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hsa_compile.errors import InvalidArgument

ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Bytes that replace as many others from `start` on."""

    start: int
    text: bytes

    @property
    def end(self) -> int:
        """The place after the last byte."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """Everything about a sample but its haystack.

    Attributes:
        task: its name, as in `TASKS`.
        length: the length of the sample in bytes; the question ends there.
        needles: the needles, in the order in which they were drawn, which is not that of the text.
        asked: which of them the answers need.
        question: the text at the end of the sample, with the answers in it.
        answer_spans: (start, end) of each answer in the sample; every byte of it is to be predicted.
        depth: where the first asked needle lies, from 0, the beginning, to 1, as late as the distance to the question
            allows; in a chain of three, where the one lies that was placed first.
    """

    task: str
    length: int
    needles: tuple[Edit, ...]
    asked: tuple[int, ...]
    question: Edit
    answer_spans: tuple[tuple[int, int], ...]
    depth: float

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All that distinguishes the sample from its haystack, in the order of the text."""
        return (*sorted(self.needles, key=lambda edit: edit.start), self.question)

    @property
    def asked_starts(self) -> tuple[int, ...]:
        """Where the needles begin that a model must find."""
        return tuple(self.needles[index].start for index in self.asked)

    def apply(self, haystack: ByteArray | bytearray) -> "TaskSample":
        """Makes the sample: a copy of the haystack with the edits in place.

        Raises:
            InvalidArgument: the haystack has another length.
        """
        if len(haystack) != self.length:
            raise InvalidArgument(f"haystack of {len(haystack)} bytes; the sample has {self.length}")
        tokens = np.frombuffer(haystack, np.uint8).copy()
        for edit in self.edits:
            tokens[edit.start : edit.end] = np.frombuffer(edit.text, np.uint8)
        return TaskSample(tokens=tokens, plan=self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskSample:
    """A sample to be read by a model.

    Attributes:
        tokens: `[length]` of uint8, the question and its answers at the end.
        plan: what was hidden where.
    """

    tokens: ByteArray
    plan: TaskPlan

    @property
    def task(self) -> str:
        """The task's name."""
        return self.plan.task

    @property
    def depth(self) -> float:
        """Where the first asked needle lies, 0 to 1."""
        return self.plan.depth

    @property
    def answer_spans(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of each answer."""
        return self.plan.answer_spans

    @property
    def needle_starts(self) -> tuple[int, ...]:
        """Where each needle begins."""
        return tuple(edit.start for edit in self.plan.needles)

    def is_answered_by(self, predicted: npt.ArrayLike) -> bool:
        """Whether every byte of every answer was predicted.

        Args:
            predicted: the most likely byte at each position given those before it, aligned so that its last entry
                stands for the sample's last byte; it may begin anywhere before the first answer.

        Raises:
            InvalidArgument: `predicted` begins after the first answer, or is longer than the sample.
        """
        found = np.asarray(predicted)
        offset = len(self.tokens) - len(found)
        if not 0 <= offset <= self.answer_spans[0][0]:
            least, most = len(self.tokens) - self.answer_spans[0][0], len(self.tokens)
            raise InvalidArgument(f"{len(found)} predictions; allowed are {least} to {most}")
        return all(
            np.array_equal(found[start - offset : end - offset], self.tokens[start:end])
            for start, end in self.answer_spans
        )


NEEDLE_BYTES = len(" abc=1234.")
QUERY_BYTES = len(" ?abc=1234.")
CHAIN_LENGTH = 3
CHAIN_QUERY_BYTES = len(" ?ghi=def=abc=1234.")
_LETTERS = b"abcdefghijklmnopqrstuvwxyz"
_NUM_KEYS = len(_LETTERS) ** 3
_NUM_VALUES = 10_000
MAX_NEEDLES = 1_000  # out of 17,576 keys, so that enough are left where a text holds many


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Needles and the question about them, before they are placed.

    Attributes:
        needles: texts of at most `NEEDLE_BYTES`; those of a chain follow each other, and must do so when placed.
        num_chains: how many chains there are; 0 where needles are independent.
        asked: which needles the answers need.
        question: the text of the question, with the answers in it.
        answer_spans: (start, end) of each answer in `question`.
    """

    needles: tuple[bytes, ...]
    num_chains: int = 0
    asked: tuple[int, ...]
    question: bytes
    answer_spans: tuple[tuple[int, int], ...]


def draw_keys(rng: random.Random, count: int, text: bytes | bytearray) -> list[bytes]:
    """Draws different keys, none of which the text assigns a value to already.

    Raises:
        InvalidArgument: the text leaves too few keys.
    """
    if not 1 <= count <= MAX_NEEDLES:
        raise InvalidArgument(f"{count} needles; allowed are 1 to {MAX_NEEDLES}")
    is_free = b"=" not in text
    keys: list[bytes] = []
    for number in rng.sample(range(_NUM_KEYS), min(4 * count + 64, _NUM_KEYS) if not is_free else count):
        key = bytes((_LETTERS[number // 676], _LETTERS[number // 26 % 26], _LETTERS[number % 26]))
        if is_free or key + b"=" not in text:
            keys.append(key)
            if len(keys) == count:
                return keys
    raise InvalidArgument(f"the haystack assigns to too many names to hide {count} needles in it")


def draw_similar_keys(rng: random.Random, count: int, text: bytes | bytearray) -> list[bytes]:
    """Draws keys as `draw_keys` does, but about half of them differ from an earlier one in a single letter.

    Raises:
        InvalidArgument: the text leaves too few keys.
    """
    keys = draw_keys(rng, count, text)
    used = set(keys)
    for index in range(1, count):
        key = bytearray(keys[rng.randrange(index)])
        key[rng.randrange(len(key))] = rng.choice(_LETTERS)
        similar = bytes(key)
        if rng.random() < 0.5 and similar not in used and similar + b"=" not in text:
            keys[index] = similar
            used.add(similar)
    return keys


def lookup_facts(rng: random.Random, keys: list[bytes], num_queries: int) -> Facts:
    """Makes independent needles, the first `num_queries` of which are asked for, in that order.

    Args:
        rng: draws the values, all different.
        keys: one for each needle.
        num_queries: how many are asked for, from 1 to the number of keys.
    """
    if not 1 <= num_queries <= len(keys):
        raise InvalidArgument(f"num_queries {num_queries}; allowed are 1 to {len(keys)}, the number of needles")
    values = [b"%04d" % value for value in rng.sample(range(_NUM_VALUES), len(keys))]
    question = b"".join(b" ?%b=%b." % pair for pair in zip(keys[:num_queries], values, strict=False))
    ends = range(NEEDLE_BYTES, len(question), QUERY_BYTES)
    return Facts(
        needles=tuple(b" %b=%b." % pair for pair in zip(keys, values, strict=True)),
        asked=tuple(range(num_queries)),
        question=question,
        answer_spans=tuple((end - 4, end) for end in ends),
    )


def chain_facts(rng: random.Random, keys: list[bytes], num_queries: int) -> Facts:
    """Makes chains of `CHAIN_LENGTH` variables; the last variable of the first `num_queries` chains is asked for.

    Args:
        rng: draws the values.
        keys: `CHAIN_LENGTH` for each chain.
        num_queries: how many chains are asked for, from 1 to the number of chains.
    """
    num_chains, rest = divmod(len(keys), CHAIN_LENGTH)
    if rest or not 1 <= num_queries <= num_chains:
        raise InvalidArgument(
            f"{len(keys)} needles and {num_queries} queries; allowed are multiples of {CHAIN_LENGTH} needles "
            "and from 1 query to one a chain"
        )
    needles: list[bytes] = []
    question = b""
    spans = []
    for chain, value in enumerate(rng.sample(range(_NUM_VALUES), num_chains)):
        names = keys[chain * CHAIN_LENGTH : (chain + 1) * CHAIN_LENGTH]
        path = [b"%04d" % value, *names]
        needles += (b" %b=%b." % (name, source) for source, name in zip(path, names, strict=False))
        if chain < num_queries:
            question += b" ?%b=" % names[-1]
            answer = b"=".join(path[-2::-1])
            spans.append((len(question), len(question) + len(answer)))
            question += answer + b"."
    return Facts(
        needles=tuple(needles),
        num_chains=num_chains,
        asked=tuple(range(num_queries * CHAIN_LENGTH)),
        question=question,
        answer_spans=tuple(spans),
    )
