"""A contender: something that can be timed on a case, with what it claims to compute."""

from collections.abc import Callable
from dataclasses import dataclass

from hsa_compile.comparison.case import Call, Case, sparse_work
from hsa_compile.comparison.choices import KINDS
from hsa_compile.errors import InvalidArgument
from hsa_compile.schedules.work import Work

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
        if self.computes not in CLAIMS:
            raise InvalidArgument(f"computes = {self.computes!r} is not one of {', '.join(CLAIMS)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise InvalidArgument(f"kind = {kind!r} is not one of {', '.join(KINDS)}")

    def effort_of(self, case: Case) -> float:
        """Returns the effort of a case, or the FLOPs of its work where `effort` is None."""
        return self.effort(case) if self.effort is not None else self.work(case).flops


# Errors are caught by name, so that an interrupt, an exit or an error without a name ends the run as elsewhere.
FOREIGN_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, NameError,
    OSError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip

_LONGEST = 300


def one_line(error: BaseException) -> str:
    """Returns name and message of an error; of a long one, only the first lines."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
