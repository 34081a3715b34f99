"""Shares of right answers by task, length and depth."""

import itertools
from dataclasses import dataclass

from hsa_compile.model.evaluation.intervals import wilson_interval
from hsa_compile.model.evaluation.outcomes import OutcomeFile
from hsa_compile.model.evaluation.settings import RetrievalSettings, haystack_key, sample_key
from hsa_compile.model.evaluation.subject import Subject
from hsa_compile.model.tasks.haystack import Haystack


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A share of right answers.

    Attributes:
        task, haystack, protocol, length: of its samples.
        depth: of the first asked needle; None for all depths together.
        num_samples, num_correct: of it.
    """

    task: str
    haystack: str
    protocol: str
    length: int
    depth: float | None
    num_samples: int
    num_correct: int

    @property
    def accuracy(self) -> float:
        """Share of samples of which every answer was right."""
        return self.num_correct / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence."""
        return wilson_interval(self.num_correct, self.num_samples)


def retrieval_cells(
    subject: Subject, settings: RetrievalSettings, haystack: Haystack, outcomes: OutcomeFile
) -> list[Cell]:
    """The cells of which all samples are in the file; behind those of each length, all its depths together."""
    common = subject.key() | haystack_key(haystack)
    cells = []
    for task, protocol, length in itertools.product(settings.tasks, settings.protocols, settings.lengths):
        by_depth: dict[float | None, list[bool]] = {}
        for depth in settings.depths:
            keys = (
                sample_key(settings, common, task, length, depth, index, protocol)
                for index in range(settings.num_samples)
            )
            found = [bool(values["correct"]) for key in keys if (values := outcomes.get(key)) is not None]
            if len(found) == settings.num_samples:
                by_depth[depth] = found
        if by_depth:
            by_depth[None] = [correct for found in by_depth.values() for correct in found]
        cells += [
            Cell(
                task=task,
                haystack=haystack.name,
                protocol=protocol,
                length=length,
                depth=depth,
                num_samples=len(found),
                num_correct=sum(found),
            )
            for depth, found in by_depth.items()
        ]
    return cells
