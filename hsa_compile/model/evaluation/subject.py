"""The model that is evaluated, and where its memory lies meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.tokenizer import BYTES, Tokenizer
from hsa_compile.model.inference.generate import evaluating
from hsa_compile.model.inference.inference import PIECE, ModelState, new_state
from hsa_compile.model.inference.reading import fingerprint
from hsa_compile.model.transformer import HSATransformer

ROW_TOKENS = 2**16  # how many tokens all rows of a batch have together
PIECE_TOKENS = 2**14


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A model with all that its answers depend on.

    Attributes:
        name: the name that is printed.
        model: the model, in evaluation mode.
        tokenizer: the tokenizer of the model.
        memory: where chunk keys and values lie, as in `new_state`.
        memory_dtype: the dtype in which they are kept; the weights' if None.
        directory: where their files are made, for `disk`.
        mesh: the processes that read each text together; None for this one alone.
        fingerprint: the fingerprint of the model.
    """

    name: str
    model: HSATransformer
    tokenizer: Tokenizer
    memory: str = "device"
    memory_dtype: torch.dtype | None = None
    directory: Path | None = None
    mesh: DeviceMesh | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", fingerprint(self.model))

    def new_state(self, batch: int = 1) -> ModelState:
        """Makes the state before the first token of `batch` texts."""
        return new_state(
            self.model,
            batch,
            memory=self.memory,
            directory=self.directory,
            memory_dtype=self.memory_dtype,
            mesh=self.mesh,
        )

    def key(self) -> dict[str, str]:
        """Returns what tells its results from those of others; where the memory lies changes none."""
        dtype = self.memory_dtype or self.model.embedding.weight.dtype
        key = {"model": self.fingerprint, "memory_dtype": str(dtype).removeprefix("torch.")}
        return key if self.tokenizer.digest == BYTES else key | {"tokenizer": self.tokenizer.digest}

    def check_vocabulary(self) -> None:
        """Raises InvalidArgument unless the model has all tokens in which tasks are written."""
        if self.model.config.vocab_size < self.tokenizer.vocab_size:
            raise InvalidArgument(
                f"tasks are written in the {self.tokenizer.vocab_size} tokens of {self.tokenizer.name}; the vocabulary "
                f"of {self.name} has {self.model.config.vocab_size}"
            )


def num_rows(length: int) -> int:
    """Returns how many texts of a length are read at once."""
    return max(1, ROW_TOKENS // length)


def piece_of(rows: int) -> int:
    """Returns how many tokens of each of so many rows run through the layers at once."""
    return min(PIECE, max(64, PIECE_TOKENS // rows))


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
