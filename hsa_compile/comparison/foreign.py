"""What code that is not ours may raise, and how it is told in one line."""

# By name, so that an interrupt, an exit or an error without a name ends the run as everywhere else.
FOREIGN_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, NameError,
    OSError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip

_LONGEST = 300


def one_line(error: BaseException) -> str:
    """Name and message of an error; the first lines if they are many."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
