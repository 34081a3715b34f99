"""A contender: something that can be timed on a case, with what it claims to compute."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hsa_compile.checks import check_choice, one_line
from hsa_compile.comparison import BOTH, KINDS
from hsa_compile.errors import InvalidArgument, InvalidProblem
from hsa_compile.kernels.hsa_attention.inputs import Inputs
from hsa_compile.kernels.hsa_decode.inputs import DecodeInputs
from hsa_compile.kernels.ops import OpInputs, inputs_of
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import count_work
from hsa_compile.schedules.ops.backend import Work
from hsa_compile.schedules.schedule import Schedule

Results = tuple[Tensor, ...]
Call = Callable[[], Results]

# Forward is one pass over the chunks, backward five products: that has to be done, whatever a schedule does beyond.
_LEAST = Schedule.of("chunk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A problem with its tensors on a device.

    Attributes:
        kind: `forward` or `both` (forward and backward), which are hsa_attention's, `select`, or `decode`.
        problem: the problem whose op is that of the forward kernel.
        device: the device on which it runs.
        inputs: the tensors, which no contender may write to.
    """

    kind: str
    problem: Problem
    device: torch.device
    inputs: OpInputs

    def __post_init__(self) -> None:
        if KINDS.get(self.kind) != self.problem.op:
            raise InvalidArgument(f"kind = {self.kind!r} of {self.problem.op} is not one of {KINDS}")

    @staticmethod
    def of(kind: str, problem: Problem, device: torch.device, *, distribution: str = "random", seed: int = 0) -> "Case":
        """Makes a case whose tensors are those that a tuning would take."""
        inputs = inputs_of(problem, device, distribution=distribution, seed=seed)
        return Case(kind=kind, problem=problem, device=device, inputs=inputs)

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops of the kernels that take part."""
        return (self.problem.op, "hsa_backward") if self.kind == BOTH else (self.problem.op,)

    @property
    def attention(self) -> Inputs:
        """The tensors of hsa_attention."""
        assert isinstance(self.inputs, Inputs)
        return self.inputs

    @property
    def decoding(self) -> DecodeInputs:
        """The tensors of hsa_decode."""
        assert isinstance(self.inputs, DecodeInputs)
        return self.inputs


def check_length(problem: Problem) -> None:
    """Checks that there is anything to compute: the last token must see a chunk, which is one that ended before it.

    Raises:
        InvalidProblem: no token sees any chunk.
    """
    if problem.kv_len <= problem.chunk_size:
        raise InvalidProblem(
            f"{problem.describe()} has {problem.kv_len} tokens; more than chunk_size = {problem.chunk_size} are "
            "needed, else no token sees a whole chunk"
        )


def sparse_work(case: Case) -> Work:
    """Counts the products of the picks that are there, with each tensor moved once; for contenders that use picks."""
    filled = case.inputs.filled()
    works = [count_work(case.problem.with_op(op), _LEAST) for op in case.ops]
    return replace(
        works[0],
        flops=filled * sum(work.flops for work in works),
        memory_bytes=sum(work.memory_bytes for work in works),
        cache_bytes=sum(work.cache_bytes for work in works),
    )


def dense_work(case: Case) -> Work:
    """Counts the products of every query with all keys before it, with each tensor moved once."""
    problem = case.problem
    D, Dv, T, S = problem.head_dim, problem.value_dim, problem.seq_len, problem.kv_len
    least = min(T, S)
    pairs = problem.batch * problem.num_heads * (least * (least + 1) / 2 + least * abs(T - S))
    queries = problem.batch * T * problem.num_heads * (D + Dv)
    keys = problem.batch * S * problem.num_kv_heads * (D + Dv)
    backward = case.kind == BOTH
    return Work(
        flops=2.0 * pairs * (4 * D + 3 * Dv if backward else D + Dv),
        memory_bytes=(queries + keys) * problem.itemsize * (3 if backward else 1),
        cache_bytes=0.0,
    )


SAME = "same function"
DENSE = "dense"
SPARSE = "same sparsity, another function"
CLAIMS = (SAME, DENSE, SPARSE)


def available(case: Case) -> str | None:
    """Returns None: nothing speaks against it."""
    del case
    return None


def nothing(case: Case) -> str:
    """Returns an empty note."""
    del case
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A way to compute something from the tensors of a case.

    Attributes:
        name: the name that tables show.
        computes: `SAME`, what the op is defined to be; `DENSE`, attention to everything before; or `SPARSE`, one
            softmax over the same chunks together.
        make: makes a call that computes it once, on tensors that are laid out beforehand as it likes them.
        check: compares a call with the float64 definition of what it claims, and raises WrongResult.
        why_not: says why it cannot run a case, in words; None if it can.
        kinds: the kinds of cases that it is made for.
        work: says what it has to do at least, by which its rates are counted.
        effort: FLOPs, or what grows like them, which foretell its time on a longer case; those of `work` if None.
        note: says what else a reader of its times should know.
    """

    name: str
    computes: str
    make: Callable[[Case], Call]
    check: Callable[[Case, Call], None]
    why_not: Callable[[Case], str | None] = available
    kinds: tuple[str, ...] = tuple(KINDS)
    work: Callable[[Case], Work] = sparse_work
    effort: Callable[[Case], float] | None = None
    note: Callable[[Case], str] = nothing

    def __post_init__(self) -> None:
        check_choice("computes", self.computes, CLAIMS)
        for kind in self.kinds:
            check_choice("kind", kind, KINDS)

    def effort_of(self, case: Case) -> float:
        """Returns the effort of a case, or the FLOPs of its work where `effort` is None."""
        return self.effort(case) if self.effort is not None else self.work(case).flops


# Errors are caught by name, so that an interrupt, an exit or an error without a name ends the run as elsewhere.
FOREIGN_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, NameError,
    OSError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


def name_and_message(error: BaseException) -> str:
    """Returns name and message of an error in one line."""
    text = one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
