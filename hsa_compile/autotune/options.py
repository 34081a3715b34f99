"""How a search is run: its budget, its sampler, where its study is kept, and how careful it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hsa_compile.autotune.bench.isolation import Limits
from hsa_compile.autotune.choices import (
    DEFAULT_SAMPLER,
    DEFAULT_TIMEOUT_S,
    DEFAULT_TRIALS,
    MAX_SEED,
    SAMPLERS,
)
from hsa_compile.autotune.study.storage import check_address
from hsa_compile.errors import InvalidArgument
from hsa_compile.problem import DISTRIBUTIONS

OPEN_BENCH = "hsa_compile.autotune.bench.bench:open_bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """What `tune` does with a problem.

    Attributes:
        trials: candidates to try at most, the default included, by all workers of the study.
        timeout: seconds for everything; the play-off gets a fifth.
        seed: of the sampler and the inputs.
        distribution: of the picks, one of `choices.DISTRIBUTIONS`.
        sampler: one of `choices.SAMPLERS`.
        until_within: ends the search early when no more than this share of the best time is expected to be left to
            gain; for samplers without a model, when the last candidates gained no more.
        storage: where the study is kept, so that a killed search goes on (`storage.open_storage`); None for memory.
        ledger: file that keeps every timing for later searches, and gives them; None for none.
        anew: begin a new study, and time again what the ledger knows.
        workers: searches at once, dealt out to the devices.
        isolate: candidates run in processes of their own; else in this one, which starts sooner but dies with them.
        limits: what a candidate is killed for; by default the memory that is free, and `Limits`' own times.
        bench: `module:function` that opens the bench, in a worker process if candidates are isolated.
    """

    trials: int = DEFAULT_TRIALS
    timeout: float = DEFAULT_TIMEOUT_S
    seed: int = 0
    distribution: str = "random"
    sampler: str = DEFAULT_SAMPLER
    until_within: float | None = None
    storage: str | None = None
    ledger: Path | None = None
    anew: bool = False
    workers: int = 1
    isolate: bool = True
    limits: Limits | None = None
    bench: str = OPEN_BENCH

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InvalidArgument(f"trials = {self.trials} must be at least 1")
        if not self.timeout > 0:
            raise InvalidArgument(f"timeout = {self.timeout} must be more than 0 seconds")
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidArgument(f"seed = {self.seed} must be in 0 … {MAX_SEED}")
        if self.workers < 1:
            raise InvalidArgument(f"workers = {self.workers} must be at least 1")
        if self.workers > 1 and not self.isolate:
            raise InvalidArgument(f"workers = {self.workers} need isolation; without it there is one")
        if self.until_within is not None and not 0 < self.until_within < 1:
            raise InvalidArgument(f"until_within = {self.until_within} must be a share between 0 and 1")
        if self.storage is not None:
            check_address(self.storage)
        _check_name("distribution", self.distribution, DISTRIBUTIONS)
        _check_name("sampler", self.sampler, SAMPLERS)


def _check_name(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidArgument(f"{name} = {value!r} is not one of {', '.join(allowed)}")
