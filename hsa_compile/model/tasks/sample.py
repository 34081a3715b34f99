"""A question about needles in a haystack, as edits of the haystack and as the bytes that result."""

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
