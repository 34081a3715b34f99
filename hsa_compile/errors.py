"""The errors and warnings that a user of hsa-compile can meet, as a tree.

HSACompileError
├── InvalidArgument (ValueError)   a value, shape, dtype or flag that is not allowed
│   ├── InvalidProblem             … in the description of a problem
│   ├── InvalidTarget              … in the name of a device
│   └── InvalidSchedule            … in a schedule, or a schedule that the problem cannot use
├── MissingDependency              a package that this feature needs is not installed
├── CompileError                   the compiler refused an emitted kernel
│   └── CompilerCrashed            … or it died, or the machine did not let it work
├── OutOfResources                 a kernel needs more registers, shared memory or memory than there is
│   └── OutOfMemory                … than was free when it ran
├── WrongResult                    a kernel disagrees with the reference
│   └── NotFinite                  … by values that are infinite or not a number
├── CandidateCrashed               the process that ran a candidate died
├── CandidateError                 a candidate raised an error that has no name here
├── TimedOut                       a candidate ran too long
│   └── CompileTimedOut            … while it was compiled
├── StorageError                   the storage of studies cannot be opened, or stopped answering
├── CorpusError                    a prepared corpus is incomplete, damaged or cannot be written
│   └── UnreadableSource           … a file of text that is skipped as a whole
├── SaveError                      a saved model, memory or reading is damaged, foreign or cannot be written
├── TrainingError                  a training run cannot go on
└── CacheError                     the schedule cache cannot be written

HSACompileWarning (UserWarning)
├── CacheWarning                   a cache file or entry was ignored
└── UntunedWarning                 the default schedule runs
    └── DistantWarning             … or one that was tuned too far away
"""

import errno
import os
import re
import sys
import warnings
from pathlib import Path


class HSACompileError(Exception):
    """The base of all errors that hsa-compile raises on purpose."""


class InvalidArgument(HSACompileError, ValueError):
    """A value, shape, dtype or flag is not allowed; the message shows it and what is allowed."""


class InvalidProblem(InvalidArgument):
    """The description of a problem contradicts itself or is out of range."""


class InvalidTarget(InvalidArgument):
    """A device does not exist, is not present, or is not supported."""


class InvalidSchedule(InvalidArgument):
    """A schedule has an unknown knob or choice, or the problem cannot use it."""


class MissingDependency(HSACompileError):
    """A package that this feature needs is not installed."""


class CompileError(HSACompileError):
    """The compiler refused an emitted kernel."""


class CompilerCrashed(CompileError):
    """The compiler died, or the machine did not let it do its work; the message shows what it said."""


class OutOfResources(HSACompileError):
    """A kernel needs more registers, shared memory or memory than the device has."""


class OutOfMemory(OutOfResources):
    """A candidate needs more memory than was free when it ran, or Linux killed it for want of memory."""


class WrongResult(HSACompileError):
    """A kernel disagrees with the reference beyond the tolerance of its dtype."""


class NotFinite(WrongResult):
    """A kernel or a model gives values that are infinite or not a number."""


class CandidateCrashed(HSACompileError):
    """The process that compiled or ran a candidate died; the message says what it died of."""


class CandidateError(HSACompileError):
    """A candidate raised an error that has no name here; the message shows it."""


class TimedOut(HSACompileError):
    """A candidate ran longer than its limit and was killed."""


class CompileTimedOut(TimedOut):
    """A candidate took longer to compile than its limit and was killed."""


# Errors that another day may not repeat: the machine may be at fault.
PASSING = (TimedOut, CandidateCrashed, CompilerCrashed, OutOfMemory)
_MACHINE_ERRNOS = ("ENOSPC", "EDQUOT", "EROFS", "EIO", "ENOMEM", "EAGAIN", "EMFILE", "ENFILE", "ETXTBSY")
_OF_MACHINE = re.compile(
    "|".join(
        [re.escape(os.strerror(getattr(errno, name))) for name in _MACHINE_ERRNOS if hasattr(errno, name)]
        + ["out of memory", "memory exhausted", "Killed", "signal terminated program", "due to signal"]
    )
)


def compile_error(message: str) -> CompileError:
    """Returns the error for what a compiler said: that it refuses the source, or that the machine is at fault."""
    return CompilerCrashed(message) if _OF_MACHINE.search(message) else CompileError(message)


def may_pass(failure: str) -> bool:
    """Returns whether a candidate that failed with an error of this name may succeed on another day."""
    kind = globals().get(failure)
    return isinstance(kind, type) and issubclass(kind, PASSING)


class StorageError(HSACompileError):
    """The storage of studies cannot be opened or does not answer."""


class CorpusError(HSACompileError):
    """A prepared corpus is incomplete, damaged or cannot be written; the message names the file."""


class UnreadableSource(CorpusError):
    """A source of documents cannot be read to its end, so none of it is used."""


class SaveError(HSACompileError):
    """A saved model, memory or reading is incomplete, damaged, foreign or cannot be written; the message names it."""


class TrainingError(HSACompileError):
    """A training run cannot go on: its loss is not a number, or its data are not those it began with."""


class CacheError(HSACompileError):
    """The schedule cache cannot be written; what was there is untouched."""


class HSACompileWarning(UserWarning):
    """The base of all warnings that hsa-compile gives."""


class CacheWarning(HSACompileWarning):
    """A cache file or entry could not be used and was ignored."""


class UntunedWarning(HSACompileWarning):
    """The default schedule runs because none was tuned."""


class DistantWarning(UntunedWarning):
    """The schedule that runs was tuned for a shape so far away that nobody knows how much time it loses."""


_OURS = str(Path(__file__).parent)


def warn_user(message: str, category: type[HSACompileWarning]) -> None:
    """Gives a warning that points at the user's line: the nearest one that is neither ours, PyTorch's nor Python's."""
    torch = sys.modules.get("torch")
    inside = (_OURS, "<frozen ", *([str(Path(torch.__file__).parent)] if torch and torch.__file__ else []))
    frame = caller = sys._getframe(1)
    while frame.f_code.co_filename.startswith(inside):
        if frame.f_back is None:  # a thread of PyTorch's, in which no line is the user's
            frame = caller
            break
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__") or "__main__",  # without a name, Python says nothing at all
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
