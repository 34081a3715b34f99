"""Shares of right answers with their intervals, by depth and by place in a chunk, from the outcomes of samples."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hsa_compile.model.evaluation.outcomes import OutcomeFile, Values
from hsa_compile.model.evaluation.settings import RetrievalSettings, haystack_key, sample_key
from hsa_compile.model.evaluation.subject import Subject
from hsa_compile.model.tasks.family import haystack_of
from hsa_compile.model.tasks.haystack import Haystack

_Z = 1.959963984540054  # standard deviations that a 95 % interval reaches to each side


def wilson_interval(num_correct: int, num_samples: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval (1927) for a share; it is right for few samples and for shares of 0 and 1 too.

    Args:
        num_correct: how many were right, from 0 to the number of samples.
        num_samples: how many there are, 1 or more.
    """
    assert 0 <= num_correct <= num_samples > 0, (num_correct, num_samples)
    share, z2 = num_correct / num_samples, _Z**2
    middle = share + z2 / (2 * num_samples)
    half = _Z * math.sqrt(share * (1 - share) / num_samples + z2 / (4 * num_samples**2))
    scale = 1 + z2 / num_samples
    low = 0.0 if num_correct == 0 else (middle - half) / scale
    high = 1.0 if num_correct == num_samples else (middle + half) / scale
    return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The share of right answers among samples of one kind.

    Attributes:
        task, haystack, protocol, length: what its samples have in common.
        depth: where their asked needle lies; None for all depths together.
        num_samples, num_correct: how many samples there are, and how many were answered right.
        by_offset: (samples, right ones) by where in its chunk the needle begins; only of all depths together, and of
            tasks with a depth.
        cut: (samples, right ones) of needles that lie over the border of two chunks.
    """

    task: str
    haystack: str
    protocol: str
    length: int
    depth: float | None
    num_samples: int
    num_correct: int
    by_offset: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    cut: tuple[int, int] = (0, 0)

    @property
    def accuracy(self) -> float:
        """The share of samples whose every answer was right."""
        return self.num_correct / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson_interval(self.num_correct, self.num_samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """The mean accuracy of several tasks, each counting the same.

    Attributes:
        protocol, length: what its samples have in common.
        num_tasks: how many tasks there are.
        accuracy: the mean of their accuracies.
        interval: its 95 % interval, from those of the tasks (MOVER, Zou and Donner 2008).
    """

    protocol: str
    length: int
    num_tasks: int
    accuracy: float
    interval: tuple[float, float]


def mean_of(cells: Sequence[Cell]) -> Mean:
    """Returns the mean of cells of one protocol and length, one a task."""
    count = len(cells)
    accuracy = sum(cell.accuracy for cell in cells) / count
    low = math.sqrt(sum((cell.accuracy - cell.interval[0]) ** 2 for cell in cells)) / count
    high = math.sqrt(sum((cell.accuracy - cell.interval[1]) ** 2 for cell in cells)) / count
    return Mean(
        protocol=cells[0].protocol,
        length=cells[0].length,
        num_tasks=count,
        accuracy=accuracy,
        interval=(accuracy - low, accuracy + high),
    )


def retrieval_cells(
    subject: Subject, settings: RetrievalSettings, text: Haystack | None, outcomes: OutcomeFile
) -> list[Cell]:
    """Returns the cells all of whose samples are in the file; behind those of a length, all its depths together."""
    cells = []
    for task, protocol, length in itertools.product(settings.tasks, settings.protocols, settings.lengths):
        haystack = haystack_of(task, text)
        common = subject.key() | haystack_key(haystack)
        by_depth: dict[float | None, list[Values | None]] = {}
        for depth, index in settings.samples_of(task):
            key = sample_key(settings, common, task, length, depth, index, protocol)
            by_depth.setdefault(depth, []).append(outcomes.get(key))
        whole = {depth: _all_there(found) for depth, found in by_depth.items()}
        known = {depth: found for depth, found in whole.items() if found}
        if known:
            known[None] = [values for found in known.values() for values in found]
        cells += [
            Cell(
                task=task,
                haystack=haystack.name,
                protocol=protocol,
                length=length,
                depth=depth,
                num_samples=len(found),
                num_correct=sum(values["correct"] for values in found),
                **(_by_place(subject, found) if depth is None else {}),
            )
            for depth, found in known.items()
        ]
    return cells


def _all_there(found: Sequence[Values | None]) -> list[Values]:
    """Returns outcomes if none is missing, or nothing."""
    known = [values for values in found if values is not None]
    return known if len(known) == len(found) else []


def _by_place(subject: Subject, found: Sequence[Values]) -> dict[str, Any]:
    """Counts samples and right ones by where in its chunk the needle begins, and those whose needle two chunks have."""
    config = subject.model.config
    by_offset: dict[int, tuple[int, int]] = {}
    cut = (0, 0)
    for values in found:
        if "start" not in values:
            continue
        correct = int(values["correct"])
        first, last = (config.layer_position(place) for place in (values["start"], values["end"] - 1))
        offset = first % config.chunk_size
        samples, right = by_offset.get(offset, (0, 0))
        by_offset[offset] = (samples + 1, right + correct)
        if first // config.chunk_size != last // config.chunk_size:
            cut = (cut[0] + 1, cut[1] + correct)
    return {"by_offset": dict(sorted(by_offset.items())), "cut": cut}
