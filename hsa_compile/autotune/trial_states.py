"""What a trial's state and attributes say: whether it counts, still chooses its point, or has lost its process."""

import itertools
from collections.abc import Sequence
from datetime import datetime, timedelta

from optuna.trial import FrozenTrial, TrialState

from hsa_compile.autotune.owner import is_gone

# What our trials carry beside their parameters.
OWNER, CLAIMED, OUTCOME, SKIPPED, LEDGER = "owner", "claimed", "outcome", "skipped", "ledger"

CHOOSING_S = 10.0  # for a sampler to choose a point; beyond that its process is taken for stuck


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those that the study may have: being tried, or with an outcome of its own."""
    if is_skipped(trial) or LEDGER in trial.user_attrs:
        return False
    return trial.state == TrialState.RUNNING or OUTCOME in trial.user_attrs


def num_idle(trials: Sequence[FrozenTrial]) -> int:
    """How many points in a row, up to now, were nothing new."""
    return len(list(itertools.takewhile(is_skipped, reversed(trials))))


def is_skipped(trial: FrozenTrial) -> bool:
    return SKIPPED in trial.user_attrs and OUTCOME not in trial.user_attrs


def is_choosing(trial: FrozenTrial) -> bool:
    """Whether a trial's worker may still come up with any point."""
    if trial.state != TrialState.RUNNING or CLAIMED in trial.user_attrs:
        return False
    since = trial.datetime_start
    return since is not None and datetime.now() - since < timedelta(seconds=CHOOSING_S)


def is_stale(trial: FrozenTrial) -> bool:
    if trial.state != TrialState.RUNNING or OWNER not in trial.user_attrs:
        return False
    return is_gone(trial.user_attrs[OWNER], trial.datetime_start)
