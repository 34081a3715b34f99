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
from hsa_compile.model.data.tokenizer import TokenArray
from hsa_compile.model.evaluation.edited_reading import EditedReading, num_reread, resume_position
from hsa_compile.model.evaluation.outcomes import Key, OutcomeFile, Values
from hsa_compile.model.evaluation.settings import (
    RetrievalSettings,
    haystack_key,
    least_prompt,
    length_label,
    num_haystacks,
    sample_key,
)
from hsa_compile.model.evaluation.subject import Job, Subject, num_rows, piece_of
from hsa_compile.model.inference.generate import check_finite
from hsa_compile.model.inference.inference import ModelState, extend, prefill
from hsa_compile.model.inference.snapshot import rewind, snapshot
from hsa_compile.model.tasks.family import haystack_of, sizes
from hsa_compile.model.tasks.haystack import Haystack
from hsa_compile.model.tasks.retrieval import Asked, make_edits
from hsa_compile.model.tasks.sample import TaskPlan, TaskSample
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
        state: the state that has read the first `num_read` tokens of each sample; it is changed.
        samples: samples of equal length, with answers at equal places.
        num_read: how many tokens were read, fewer than there are before the first answer.
        protocols: some of `PROTOCOLS`.
        piece: how many tokens of a row are read at once.

    Raises:
        NotFinite: the model's logits are infinite or not a number.
    """
    tokens = _tensor([sample.tokens[num_read:] for sample in samples])
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
            is_answer = [any(start <= place < end for start, end in samples[0].answer_spans)
                         for place in range(num_read + prompt, samples[0].plan.length)]  # fmt: skip
            rows = zip(samples, _written(model, state, first, rest, is_answer).cpu().numpy(), strict=True)
            found[protocol] = [sample.is_answered_with(row) for sample, row in rows]
        else:
            raise InvalidArgument(f"protocol {protocol!r}; allowed are {', '.join(PROTOCOLS)}")
    return found


def _tensor(rows: Sequence[TokenArray]) -> Tensor:
    """Stacks rows; of unsigned types PyTorch computes with bytes alone."""
    return torch.from_numpy(np.stack(rows).astype(np.uint8 if rows[0].dtype == np.uint8 else np.int64))


def _written(
    model: HSATransformer, state: ModelState, first: Tensor, rest: Tensor, is_answer: Sequence[bool]
) -> Tensor:
    """Returns the token that the model writes at each place, `[B, T]`; in answers it reads on from what it wrote.

    Args:
        model: the model.
        state: its state before the first of these places.
        first: `[B]`, what it writes there.
        rest: `[B, T]`, the sample's tokens at these places.
        is_answer: for each place, whether it is one of an answer.
    """
    written = [first]
    for step in range(rest.shape[1] - 1):
        token = written[step] if is_answer[step] else rest[:, step]
        written.append(_most_likely(extend(model, token[:, None], state))[:, 0])
    return torch.stack(written, dim=1)


def _most_likely(logits: Tensor) -> Tensor:
    """Returns the most likely token at each place, `[B, T]`."""
    for step in range(logits.shape[1]):
        check_finite(logits[:, step], [True] * len(logits), step + 1)
    return logits.argmax(dim=-1)


def retrieval_jobs(
    subject: Subject, settings: RetrievalSettings, text: Haystack | None, outcomes: OutcomeFile
) -> list[Job]:
    """Returns what is not in the file of outcomes yet, one job a haystack.

    Args:
        subject: the model that is asked.
        settings: what it is asked.
        text: what the needles of tasks in real text are hidden in; None if there are no such tasks.
        outcomes: where outcomes are kept.

    Raises:
        InvalidArgument: the model lacks tokens of its tokenizer.
    """
    subject.check_vocabulary()
    jobs = []
    for task in settings.tasks:
        haystack = haystack_of(task, text)
        common = subject.key() | haystack_key(haystack)
        for length in settings.lengths:
            for number, pending in _pending(settings, common, task, length, outcomes).items():
                group = _Group(
                    subject=subject, settings=settings, haystack=haystack, task=task, length=length, number=number,
                    pending=tuple(pending),
                )  # fmt: skip
                label = f"{task} {length_label(length)}"
                jobs.append(Job(label=label, tokens=group.tokens, run=functools.partial(group.run, outcomes)))
    return jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A sample that has not been asked by all protocols.

    Attributes:
        asked: which sample it is.
        keys: the keys under which its outcomes are kept, by protocol.
    """

    asked: Asked
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
    pending: tuple[_Pending, ...]

    @property
    def tokens(self) -> int:
        """Roughly how many tokens must be read."""
        whole = len(self.pending) * self.length
        return min(whole, self._edited_tokens()) if self._is_edited() else whole

    def run(self, outcomes: OutcomeFile) -> None:
        """Asks all samples and keeps what is found."""
        base, plans = self.plans()
        found = self._edited(base, plans) if self._is_edited() else self._whole(base, plans)
        for part in found:
            outcomes.add(part)

    def plans(self) -> tuple[TokenArray, tuple[TaskPlan, ...]]:
        """Returns the haystack, and a plan for each pending sample."""
        return make_edits(
            self.task,
            length=self.length,
            seed=self.settings.seed,
            number=self.number,
            haystack=self.haystack,
            asked=[each.asked for each in self.pending],
            min_distance=self.settings.min_distance,
            tokenizer=self.subject.tokenizer,
        )

    def _edited(self, base: TokenArray, plans: Sequence[TaskPlan]) -> Iterator[list[tuple[Key, Values]]]:
        model = self.subject.model
        prompt = min(plan.answer_spans[0][0] for plan in plans)
        reading = EditedReading(model, base, prompt, self.subject.new_state())
        for pending, plan in zip(self.pending, plans, strict=True):
            sample = plan.apply(base)
            with reading.sample(sample) as state:
                found = answered(model, state, [sample], reading.num_read, tuple(pending.keys), piece_of(1))
            yield _outcomes([pending], [plan], found)

    def _whole(self, base: TokenArray, plans: Sequence[TaskPlan]) -> Iterator[list[tuple[Key, Values]]]:
        """Asks samples together whose answers stand at equal places, as all do in bytes."""
        by_spans: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for row, plan in enumerate(plans):
            by_spans.setdefault(plan.answer_spans, []).append(row)
        size = num_rows(self.length)
        for rows in by_spans.values():
            for begin in range(0, len(rows), size):
                part = rows[begin : begin + size]
                pending, chosen = [self.pending[row] for row in part], [plans[row] for row in part]
                protocols = [name for name in PROTOCOLS if any(name in each.keys for each in pending)]
                state = self.subject.new_state(len(part))
                samples = [plan.apply(base) for plan in chosen]
                found = answered(self.subject.model, state, samples, 0, protocols, piece_of(len(part)))
                yield _outcomes(pending, chosen, found)

    def _is_edited(self) -> bool:
        """Whether it is cheaper to read the haystack once; what is read again comes in small pieces, at half speed."""
        if resume_position(self.subject.model, least_prompt(self.task, self.length)) is None:
            return False
        return self._edited_tokens() < len(self.pending) * self.length

    def _edited_tokens(self) -> int:
        config, task = self.subject.model.config, sizes(self.task)
        prompt = least_prompt(self.task, self.length)
        again = num_reread(self.subject.model, task.num_needles, task.needle, self.length, prompt)
        return (self.length if config.has_memory else 0) + 2 * len(self.pending) * again


def _outcomes(
    pending: Sequence[_Pending], plans: Sequence[TaskPlan], found: dict[str, list[bool]]
) -> list[tuple[Key, Values]]:
    """Returns what is kept of each sample: whether it was answered, and where its needle of that depth lies."""
    kept: list[tuple[Key, Values]] = []
    for row, (each, plan) in enumerate(zip(pending, plans, strict=True)):
        needle = None if plan.placed is None else plan.needles[plan.placed]
        place = {} if needle is None else {"start": needle.start, "end": needle.end}
        kept += [(key, {"correct": found[protocol][row]} | place) for protocol, key in each.keys.items()]
    return kept


def _pending(
    settings: RetrievalSettings, common: dict[str, Any], task: str, length: int, outcomes: OutcomeFile
) -> dict[int, list[_Pending]]:
    """Returns the samples that are left, by the number of their haystack."""
    groups: dict[int, list[_Pending]] = {}
    many = num_haystacks(task, length)
    for depth, index in settings.samples_of(task):
        keys: dict[str, Key] = {
            protocol: sample_key(settings, common, task, length, depth, index, protocol)
            for protocol in settings.protocols
        }
        missing = {protocol: key for protocol, key in keys.items() if outcomes.get(key) is None}
        if missing:
            each = _Pending(asked=Asked(depth=depth, index=index), keys=missing)
            groups.setdefault(index % many, []).append(each)
    return dict(sorted(groups.items()))
