"""A question about needles in a haystack, as edits of the haystack and as the tokens that result."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.tokenizer import TokenArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Tokens that replace as many others from `start` on."""

    start: int
    tokens: tuple[int, ...]

    @property
    def end(self) -> int:
        """The place after the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """Everything about a sample but its haystack.

    Attributes:
        task: its name, as in `TASKS`.
        length: the length of the sample in tokens; the question ends there.
        needles: the needles, in the order in which they were drawn, which is not that of the text.
        asked: which of them the answers need.
        placed: which of the asked needles lies at the sample's depth; None in tasks that have no depth.
        question: the tokens at the end of the sample, with the answers in them.
        answer_spans: (start, end) of each answer in the sample; every token of it is to be predicted.
        any_order: whether the answers may change places.
        depth: where that needle begins, from 0, the beginning, to 1, as late as the distance to the question allows.
    """

    task: str
    length: int
    needles: tuple[Edit, ...]
    asked: tuple[int, ...]
    placed: int | None
    question: Edit
    answer_spans: tuple[tuple[int, int], ...]
    any_order: bool
    depth: float | None

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All that distinguishes the sample from its haystack, in the order of the text."""
        return (*sorted(self.needles, key=lambda edit: edit.start), self.question)

    @property
    def asked_starts(self) -> tuple[int, ...]:
        """Where the needles begin that a model must find."""
        return tuple(self.needles[index].start for index in self.asked)

    def apply(self, haystack: TokenArray) -> "TaskSample":
        """Makes the sample: a copy of the haystack with the edits in place.

        Raises:
            InvalidArgument: the haystack has another length.
        """
        if len(haystack) != self.length:
            raise InvalidArgument(f"haystack of {len(haystack)} tokens; the sample has {self.length}")
        tokens = haystack.copy()
        for edit in self.edits:
            tokens[edit.start : edit.end] = edit.tokens
        return TaskSample(tokens=tokens, plan=self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskSample:
    """A sample to be read by a model.

    Attributes:
        tokens: `[length]`, the question and its answers at the end.
        plan: what was hidden where.
    """

    tokens: TokenArray
    plan: TaskPlan

    @property
    def task(self) -> str:
        """The task's name."""
        return self.plan.task

    @property
    def depth(self) -> float | None:
        """Where the needle lies that was placed at a depth, 0 to 1."""
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
        """Whether every token of every answer was predicted, or that of an answer which may take its place.

        Args:
            predicted: the most likely token at each position given those before it, aligned so that its last entry
                stands for the sample's last token; it may begin anywhere before the first answer.

        Raises:
            InvalidArgument: `predicted` begins after the first answer, or is longer than the sample.
        """
        found, answers = self._in_answers(predicted), self._in_answers(self.tokens)
        for number, (tokens, answer) in enumerate(zip(found, answers, strict=True)):
            left = answers[number:] if self.plan.any_order else [answer]
            for i in range(len(answer)):
                if tokens[i : i + 1] not in [other[i : i + 1] for other in left if other[:i] == answer[:i]]:
                    return False
        return True

    def is_answered_with(self, written: npt.ArrayLike) -> bool:
        """Whether the answers were written, in any order where that is allowed, and the token that ends each.

        Args:
            written: what a model wrote in the places of answers and ends, aligned as in `is_answered_by`; the tokens
                elsewhere do not count.

        Raises:
            InvalidArgument: as in `is_answered_by`.
        """
        order = sorted if self.plan.any_order else list
        return order(self._in_answers(written, ended=True)) == order(self._in_answers(self.tokens, ended=True))

    def _in_answers(self, tokens: npt.ArrayLike, *, ended: bool = False) -> list[list[int]]:
        """Returns those of tokens, which end with the sample, that stand in each answer; if `ended`, with its end."""
        found = np.asarray(tokens)
        offset = len(self.tokens) - len(found)
        if not 0 <= offset <= self.answer_spans[0][0]:
            least, most = len(self.tokens) - self.answer_spans[0][0], len(self.tokens)
            raise InvalidArgument(f"{len(found)} predictions; allowed are {least} to {most}")
        return [found[start - offset : end - offset + ended].tolist() for start, end in self.answer_spans]
