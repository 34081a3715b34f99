"""The jobs that an evaluation is made of, and running them with word of how far they are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from hsa_compile.model.inference.generate import evaluating
from hsa_compile.model.transformer import HSATransformer

OnTokens = Callable[[str, int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A part of an evaluation that keeps its own results.

    Attributes:
        label: what a progress bar says meanwhile.
        tokens: roughly how many tokens the model reads for it.
        run: does the job.
    """

    label: str
    tokens: int
    run: Callable[[], None]


def run_jobs(model: HSATransformer, jobs: Sequence[Job], on_tokens: OnTokens) -> None:
    """Runs jobs one after another.

    Args:
        model: the model that they run.
        jobs: the jobs that are left.
        on_tokens: is told the label and how many tokens more were read; for each job they add up to `Job.tokens`.
    """
    for job in jobs:
        on_tokens(job.label, 0)
        count = _Count(job, on_tokens)
        with evaluating(model), _counted(model, count):
            job.run()
        count(job.tokens)


class _Count:
    """Passes on how many tokens were read for a job, up to as many as it has."""

    def __init__(self, job: Job, on_tokens: OnTokens) -> None:
        self._label, self._left, self._on_tokens = job.label, job.tokens, on_tokens

    def __call__(self, tokens: int) -> None:
        told = min(tokens, self._left)
        self._left -= told
        self._on_tokens(self._label, told)


@contextmanager
def _counted(model: HSATransformer, count: Callable[[int], None]) -> Iterator[None]:
    """Tells `count` how many tokens run through the first layer."""
    first = next(iter([*model.lower, *model.upper]))

    def listen(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        count(inputs[0].shape[0] * inputs[0].shape[1])

    hook = first.register_forward_pre_hook(listen)
    try:
        yield
    finally:
        hook.remove()
