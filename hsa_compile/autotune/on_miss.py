"""Tuning when a call finds no schedule: off unless a program asks for it, since the call then takes a minute."""

from hsa_compile.autotune.tune import tune_missing
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.resolve import set_on_miss
from hsa_compile.log import logger
from hsa_compile.problem import Problem
from hsa_compile.target import Target

MODES = ("off", "on-miss")


def set_autotune(mode: str) -> None:
    """Says what a call does whose problem was never tuned.

    Args:
        mode: `off`, it runs the nearest schedule or the default, as in a process that never says anything;
            `on-miss`, it tunes its problem first, on the device that it is called on, and stores the winner. Every
            later call, of this process or another, finds it.

    Raises:
        InvalidArgument: the mode is neither.
    """
    if mode not in MODES:
        raise InvalidArgument(f"autotune = {mode!r} is not one of {', '.join(MODES)}")
    set_on_miss(_tune if mode == "on-miss" else None)


def _tune(problem: Problem, target: Target) -> None:
    """Tunes with the defaults of `hsa-compile tune`; the log says so where nothing could be stored."""
    record, _ = tune_missing(problem, target)
    if record.shortfall:
        logger.info("%s: nothing is stored: %s", problem.describe(), record.shortfall)
