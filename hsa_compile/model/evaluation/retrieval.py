"""Asking a model the retrieval tasks: samples that share a haystack are asked together, and kept as they are found."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import GREEDY, PROTOCOLS, TEACHER_FORCED
from hsa_compile.model.evaluation.edited_reading import EditedReading, num_reread, resume_position
from hsa_compile.model.evaluation.outcomes import Key, OutcomeFile, Values
from hsa_compile.model.evaluation.settings import (
    MAX_HAYSTACKS,
    RetrievalSettings,
    haystack_key,
    length_label,
    num_haystacks,
    prompt_length,
    sample_key,
)
from hsa_compile.model.evaluation.subject import Job, Subject, num_rows, piece_of
from hsa_compile.model.inference.generate import check_finite
from hsa_compile.model.inference.inference import ModelState, extend, prefill, rewind, snapshot
from hsa_compile.model.tasks.haystack import Haystack
from hsa_compile.model.tasks.retrieval import TASKS, make_edits
from hsa_compile.model.tasks.sample import ByteArray, TaskPlan, TaskSample
from hsa_compile.model.transformer import HSATransformer


def answered(
    model: HSATransformer,
    state: ModelState,
    samples: Sequence[TaskSample],
    num_read: int,
    protocols: Sequence[str],
    piece: int,
) -> dict[str, list[bool]]:
    """Says for each protocol whether each sample is answered.

    Args:
        model: a model in evaluation mode.
        state: the state that has read the first `num_read` bytes of each sample; it is changed.
        samples: samples of equal length, with answers at equal places.
        num_read: how many bytes were read, fewer than there are before the first answer.
        protocols: some of `PROTOCOLS`.
        piece: how many tokens of a row are read at once.

    Raises:
        NotFinite: the model's logits are infinite or not a number.
    """
    tokens = torch.from_numpy(np.stack([sample.tokens[num_read:] for sample in samples]))
    prompt = samples[0].answer_spans[0][0] - num_read
    logits = prefill(model, tokens[:, :prompt], state, piece=piece)
    check_finite(logits, [True] * len(logits), 0)
    first = logits.argmax(dim=-1)
    point = snapshot(state)
    rest = tokens[:, prompt:].to(model.device, torch.int64)
    found = {}
    for protocol in protocols:
        rewind(state, point)
        if protocol == TEACHER_FORCED:
            predicted = torch.cat((first[:, None], _most_likely(extend(model, rest[:, :-1], state))), dim=1)
            rows = zip(samples, predicted.cpu().numpy(), strict=True)
            found[protocol] = [sample.is_answered_by(row) for sample, row in rows]
        elif protocol == GREEDY:
            rows = zip(samples, _generated(model, state, first, rest).cpu().numpy(), strict=True)
            found[protocol] = [sample.is_answered_by(row) and _ends(sample, row) for sample, row in rows]
        else:
            raise InvalidArgument(f"protocol {protocol!r}; allowed are {', '.join(PROTOCOLS)}")
    return found


def _generated(model: HSATransformer, state: ModelState, first: Tensor, rest: Tensor) -> Tensor:
    """Returns the byte that the model writes at each place, `[B, T]`.

    After a byte that is wrong the true one is fed: a wrong answer stays wrong whatever follows, and a right one was fed
    what the model wrote. So whole answers come out right exactly where free generation gives them.
    """
    written = [first]
    for step in range(rest.shape[1] - 1):
        written.append(_most_likely(extend(model, rest[:, step : step + 1], state))[:, 0])
    return torch.stack(written, dim=1)


def _most_likely(logits: Tensor) -> Tensor:
    """Returns the most likely token at each place, `[B, T]`."""
    for step in range(logits.shape[1]):
        check_finite(logits[:, step], [True] * len(logits), step + 1)
    return logits.argmax(dim=-1)


def _ends(sample: TaskSample, predicted: ByteArray) -> bool:
    """Says whether a full stop was written behind each answer; without it, the answer would go on."""
    offset = len(sample.tokens) - len(predicted)
    return all(predicted[end - offset] == sample.tokens[end] for _, end in sample.answer_spans)


def retrieval_jobs(
    subject: Subject, settings: RetrievalSettings, haystack: Haystack, outcomes: OutcomeFile
) -> list[Job]:
    """Returns what is not in the file of outcomes yet, one job a haystack.

    Raises:
        InvalidArgument: the model's tokens are no bytes.
    """
    subject.check_reads_bytes()
    common = subject.key() | haystack_key(haystack)
    groups = [
        _Group(subject=subject, settings=settings, haystack=haystack, task=task, length=length, number=number,
               pending=tuple(_pending(settings, common, task, length, number, outcomes)))
        for task in settings.tasks
        for length in settings.lengths
        for number in range(min(num_haystacks(length), settings.num_samples))
    ]  # fmt: skip
    return [
        Job(
            label=f"{group.task} {length_label(group.length)}",
            tokens=group.tokens,
            run=functools.partial(group.run, outcomes),
        )
        for group in groups
        if group.pending
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A sample that has not been asked by all protocols.

    Attributes:
        depth, index: the sample's depth and number.
        keys: the keys under which its outcomes are kept, by protocol.
    """

    depth: float
    index: int
    keys: dict[str, Key]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Samples in one haystack."""

    subject: Subject
    settings: RetrievalSettings
    haystack: Haystack
    task: str
    length: int
    number: int
    pending: tuple[_Asked, ...]

    @property
    def tokens(self) -> int:
        """Roughly how many tokens must be read."""
        whole = len(self.pending) * self.length
        return min(whole, self._edited_tokens()) if self._is_edited() else whole

    def run(self, outcomes: OutcomeFile) -> None:
        """Asks all samples and keeps what is found."""
        base, plans = self._plans()
        found = self._edited(base, plans) if self._is_edited() else self._whole(base, plans)
        for part in found:
            outcomes.add(part)

    def _edited(self, base: ByteArray, plans: Sequence[TaskPlan]) -> Iterator[list[tuple[Key, Values]]]:
        model = self.subject.model
        reading = EditedReading(model, base, prompt_length(self.task, self.length), self.subject.new_state())
        for asked, plan in zip(self.pending, plans, strict=True):
            sample = plan.apply(base)
            with reading.sample(sample) as state:
                found = answered(model, state, [sample], reading.num_read, tuple(asked.keys), piece_of(1))
            yield [(key, {"correct": found[protocol][0]}) for protocol, key in asked.keys.items()]

    def _whole(self, base: ByteArray, plans: Sequence[TaskPlan]) -> Iterator[list[tuple[Key, Values]]]:
        size = num_rows(self.length)
        for begin in range(0, len(plans), size):
            part = self.pending[begin : begin + size]
            samples = [plan.apply(base) for plan in plans[begin : begin + size]]
            protocols = [name for name in PROTOCOLS if any(name in asked.keys for asked in part)]
            state = self.subject.new_state(len(samples))
            found = answered(self.subject.model, state, samples, 0, protocols, piece_of(len(samples)))
            yield [
                (key, {"correct": found[protocol][row]})
                for row, asked in enumerate(part)
                for protocol, key in asked.keys.items()
            ]

    def _plans(self) -> tuple[ByteArray, list[TaskPlan]]:
        """Returns the haystack, and a plan for each pending sample."""
        plans: dict[float, tuple[TaskPlan, ...]] = {}
        many = num_haystacks(self.length)
        for depth in dict.fromkeys(asked.depth for asked in self.pending):
            count = 1 + max(asked.index // many for asked in self.pending if asked.depth == depth)
            base, plans[depth] = make_edits(
                self.task,
                length=self.length,
                seed=self.settings.seed * MAX_HAYSTACKS + self.number,
                haystack=self.haystack,
                depths=[depth] * count,
                min_distance=self.settings.min_distance,
            )
        return base, [plans[asked.depth][asked.index // many] for asked in self.pending]

    def _is_edited(self) -> bool:
        """Whether it is cheaper to read the haystack once; what is read again comes in small pieces, at half speed."""
        if resume_position(self.subject.model, prompt_length(self.task, self.length)) is None:
            return False
        return self._edited_tokens() < len(self.pending) * self.length

    def _edited_tokens(self) -> int:
        config = self.subject.model.config
        again = num_reread(
            self.subject.model, TASKS[self.task].num_needles, self.length, prompt_length(self.task, self.length)
        )
        return (self.length if config.has_memory else 0) + 2 * len(self.pending) * again


def _pending(
    settings: RetrievalSettings, common: dict[str, Any], task: str, length: int, number: int, outcomes: OutcomeFile
) -> Iterator[_Asked]:
    for depth in settings.depths:
        for index in range(number, settings.num_samples, num_haystacks(length)):
            keys: dict[str, Key] = {
                protocol: sample_key(settings, common, task, length, depth, index, protocol)
                for protocol in settings.protocols
            }
            missing = {protocol: key for protocol, key in keys.items() if outcomes.get(key) is None}
            if missing:
                yield _Asked(depth=depth, index=index, keys=missing)
