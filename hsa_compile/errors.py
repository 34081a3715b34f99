"""Every error and warning a user of hsa-compile can meet.

HSACompileError
├── InvalidArgument (ValueError)   a value, shape, dtype or flag that is not allowed
│   ├── InvalidProblem             … in the description of a problem
│   ├── InvalidTarget              … in the name of a device
│   └── InvalidSchedule            … in a schedule, or a schedule that the problem cannot use
├── MissingDependency              a package that this feature needs is not installed
├── CompileError                   the compiler refused an emitted kernel
├── OutOfResources                 a kernel needs more registers, shared memory or memory than there is
├── WrongResult                    a kernel disagrees with the reference
└── CacheError                     the schedule cache cannot be written

HSACompileWarning (UserWarning)
├── CacheWarning                   a cache file or entry was ignored
└── UntunedWarning                 the default schedule runs because nothing was tuned
"""


class HSACompileError(Exception):
    """Base of all errors that hsa-compile raises on purpose."""


class InvalidArgument(HSACompileError, ValueError):
    """A value, shape, dtype or flag that is not allowed; the message shows it and what is."""


class InvalidProblem(InvalidArgument):
    """The description of a problem contradicts itself or is out of range."""


class InvalidTarget(InvalidArgument):
    """A device that does not exist, is not present, or is not supported."""


class InvalidSchedule(InvalidArgument):
    """A schedule with an unknown knob or choice, or one that the problem cannot use."""


class MissingDependency(HSACompileError):
    """A package that this feature needs is not installed."""


class CompileError(HSACompileError):
    """The compiler refused an emitted kernel."""


class OutOfResources(HSACompileError):
    """A kernel needs more registers, shared memory or memory than the device has."""


class WrongResult(HSACompileError):
    """A kernel disagrees with the reference beyond the tolerance of its dtype."""


class CacheError(HSACompileError):
    """The schedule cache cannot be written; what was there is untouched."""


class HSACompileWarning(UserWarning):
    """Base of all warnings that hsa-compile gives."""


class CacheWarning(HSACompileWarning):
    """A cache file or entry could not be used and was ignored."""


class UntunedWarning(HSACompileWarning):
    """The default schedule runs because no tuned one is close enough."""
