"""The options of a search: its budget, its sampler, its inputs, where its study is kept, and how careful it is.

The command line reads the names and bounds here before it loads a search, so this file imports no PyTorch.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

from hsa_compile.checks import check_choice
from hsa_compile.errors import InvalidArgument
from hsa_compile.files import read_regular
from hsa_compile.problem import DISTRIBUTIONS, PICKS_ENDING

SAMPLERS = ("ours", "tpe", "random", "grid", "gp", "cmaes")
DEFAULT_TRIALS = 40
DEFAULT_TIMEOUT_S = 55.0
DEFAULT_SAMPLER = SAMPLERS[0]
MAX_SEED = 2**32 - 1  # the largest seed that Optuna's samplers take
DATABASES = ("postgresql", "mysql", "sqlite")
PROXY = "grpc"
OPEN_BENCH = "hsa_compile.autotune.bench.bench:open_bench"
TOGETHER = " and "  # stands between the names of distributions that a search is for together


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of a candidate in time and memory, beyond which it is killed.

    Attributes:
        compile_s: the seconds that compiling it may take.
        run_s: the seconds that checking it, and each set of timings, may take; more where the default needs more than
            a tenth of that.
        first_s: the seconds that the first candidate, the default, may take alone: nothing is known before it is timed.
        memory_bytes: the bytes that it may take beyond what a worker has when it starts; None for no limit, as a GPU's
            driver needs.
    """

    compile_s: float = 120.0
    run_s: float = 20.0
    first_s: float = 600.0
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("compile_s", "run_s", "first_s", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidArgument(f"{name} = {value} must be more than 0 and finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """The options of `tune`.

    Attributes:
        trials: the most candidates to try, the default included, by all workers of the study.
        timeout: the seconds for everything; the play-off gets a fifth.
        seed: the seed for the sampler and the inputs.
        distribution: how the picks of the inputs fall: one of `problem.DISTRIBUTIONS`, several with ` and ` between
            them, or a file of recorded picks. With several, their geometric mean decides. By default a GPU is tuned
            for `random and trained`, and a CPU, where one search takes far longer, for `random`.
        sampler: what chooses the candidates, one of `SAMPLERS`.
        until_within: ends the search early when no more than this share of the best time is expected to be left to
            gain; for samplers without a model, when the last candidates gained no more.
        storage: where the study is kept, so that a killed search goes on (`storage.open_storage`); None for memory.
        ledger: a file that keeps every timing, for later searches to read; None for none.
        anew: whether to begin a new study, and to time again what the ledger knows.
        workers: how many searches run at once, dealt out to the devices.
        isolate: whether candidates run in processes of their own; else they run in this one, which starts sooner but
            dies with them.
        limits: what a candidate must keep, or it is killed; by default the free memory, and the times of `Limits`.
        bench: `module:function` that opens the bench, in a worker process if candidates are isolated.
    """

    trials: int = DEFAULT_TRIALS
    timeout: float = DEFAULT_TIMEOUT_S
    seed: int = 0
    distribution: str | None = None
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
        if not 0 < self.timeout < math.inf:
            raise InvalidArgument(f"timeout = {self.timeout} must be more than 0 seconds and finite")
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
        if self.distribution is not None:
            check_inputs(self.distribution)
        check_choice("sampler", self.sampler, SAMPLERS)

    def takes(self, inputs: str) -> bool:
        """Returns whether the record of a finished search on such inputs (`inputs_label`) spares these options one.

        Raises:
            InvalidArgument: the file of picks that they name cannot be read.
        """
        return not self.anew and (self.distribution is None or inputs_label(self.distribution) == inputs)


def default_inputs(kind: str) -> str:
    """Returns what a search is for on a kind of device unless its options say."""
    return "random" if kind == "cpu" else f"random{TOGETHER}trained"


def input_names(inputs: str) -> tuple[str, ...]:
    """Returns the distributions, or the file, that a text names."""
    return (inputs,) if inputs.endswith(PICKS_ENDING) else tuple(inputs.split(TOGETHER))


def check_inputs(inputs: str) -> None:
    """Raises unless a text names a file of picks, or distributions, each once.

    Raises:
        InvalidArgument: it names something else.
    """
    if inputs.endswith(PICKS_ENDING):
        return
    names = input_names(inputs)
    for name in names:
        check_choice("distribution", name, (*DISTRIBUTIONS, f"a file *{PICKS_ENDING}"))
    if len(set(names)) < len(names):
        raise InvalidArgument(f"distribution = {inputs!r} names one twice")


def inputs_label(inputs: str) -> str:
    """Returns what studies, ledgers and records call inputs; a file is called by its name and the digest of its bytes.

    Raises:
        InvalidArgument: the file cannot be read.
    """
    if not inputs.endswith(PICKS_ENDING):
        return inputs
    path = Path(inputs)
    try:
        digest = hashlib.sha256(read_regular(path)).hexdigest()[:12]
    except OSError as error:
        raise InvalidArgument(f"picks {inputs} cannot be read: {error.strerror or error}") from error
    return f"{path.name} ({digest})"


def check_address(address: str) -> None:
    """Raises unless an address is of a kind that `open_storage` knows.

    Raises:
        InvalidArgument: the address is of no such kind.
    """
    scheme, separator, _ = address.partition("://")
    if scheme == PROXY:
        known = re.fullmatch(r"grpc://[^:/]+:\d{1,5}", address) is not None
    else:
        known = scheme.partition("+")[0] in DATABASES if separator else address.endswith(".journal")
    if not known:
        raise InvalidArgument(
            f"storage {address!r} is not known; allowed are postgresql://…, mysql://…, sqlite:///…, grpc://HOST:PORT "
            "and FILE.journal"
        )
