"""The state of trials: whether one counts, still chooses its point, or has lost its process; and their heartbeats."""

import functools
import itertools
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from hsa_compile.autotune.evaluate import Outcome
from hsa_compile.checks import check_count, check_number, check_text, shown
from hsa_compile.errors import InvalidArgument
from hsa_compile.schedules.record import MAX_MS

# The attributes that our trials carry beside their parameters.
OWNER, CLAIMED, OUTCOME, SKIPPED, LEDGER = "owner", "claimed", "outcome", "skipped", "ledger"

CHOOSING_S = 10.0  # if a sampler takes longer to choose a point, its process is taken for stuck

_ABANDONED_AFTER = timedelta(hours=1)  # for trials of other hosts, whose processes cannot be seen from here


def check_attributes(operation: Mapping[str, Any]) -> None:
    """Checks what Optuna takes as it comes: values, names, and our attributes in an operation of a journal.

    Raises:
        InvalidArgument: something is of another type or out of range.
    """
    for name in ("study_name", "param_name"):
        check_text(name, operation.get(name, ""))
    for value in (operation.get("value"), *(operation.get("values") or ())):
        if value is not None:
            check_number("a value", value, -MAX_MS, MAX_MS)
    for name in ("directions", "values"):
        found = operation.get(name)
        if found is not None and (not isinstance(found, list) or len(found) != 1):
            raise InvalidArgument(f"{name} = {shown(found)} must be a list of one: a study has one objective")
    attributes = {**operation.get("user_attrs", {}), **operation.get("user_attr", {})}
    system_attributes = {**operation.get("system_attrs", {}), **operation.get("system_attr", {})}
    for name in (*attributes, *system_attributes):
        check_text("the name of an attribute", name)
    for name, value in attributes.items():
        if name == OUTCOME:
            Outcome.from_dict(value)
        elif name == SKIPPED:
            check_text(name, value)
        elif name == OWNER and value:
            check_text("host", value["host"])
            check_text("started", value["started"])
            check_count("pid", value["pid"], 0, 2**31 - 1)


@functools.cache
def this_process() -> dict[str, Any]:
    """Returns this process's host, number and start, as a trial carries them."""
    return {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_gone(owner: Mapping[str, Any], since: datetime | None) -> bool:
    """Returns whether nobody works on a trial any more.

    Args:
        owner: what `this_process` gave where the trial began; empty if it was given back.
        since: when the trial began.
    """
    if not owner:
        return True
    if owner["host"] != platform.node():
        return since is not None and datetime.now() - since > _ABANDONED_AFTER
    return _started(owner["pid"]) != owner["started"]


def _started(pid: int) -> str:
    """Returns when a process began, in ticks since the machine started; empty if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc").exists() or not _exists(pid) else "exists"
    return "" if fields[0] in "ZX" else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def counts(trial: FrozenTrial) -> bool:
    """Returns whether a trial counts for the study's limit: it is being tried, or has an outcome of its own."""
    if is_skipped(trial) or LEDGER in trial.user_attrs:
        return False
    return trial.state == TrialState.RUNNING or OUTCOME in trial.user_attrs


def num_idle(trials: Sequence[FrozenTrial]) -> int:
    """Counts the points in a row, up to now, that were nothing new."""
    return len(list(itertools.takewhile(is_skipped, reversed(trials))))


def is_skipped(trial: FrozenTrial) -> bool:
    return SKIPPED in trial.user_attrs and OUTCOME not in trial.user_attrs


def is_choosing(trial: FrozenTrial) -> bool:
    """Returns whether a trial's worker may still come up with any point."""
    if trial.state != TrialState.RUNNING or CLAIMED in trial.user_attrs:
        return False
    since = trial.datetime_start
    return since is not None and datetime.now() - since < timedelta(seconds=CHOOSING_S)


def is_stale(trial: FrozenTrial) -> bool:
    if trial.state != TrialState.RUNNING or OWNER not in trial.user_attrs:
        return False
    return is_gone(trial.user_attrs[OWNER], trial.datetime_start)


class Heartbeat:
    """A thread that records a heartbeat for each added trial while the context is open, where the storage keeps them.

    Optuna does so by itself only within `Study.optimize`; here trials are asked for ahead and told later.

    Args:
        storage: where the study is kept.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage if isinstance(storage, RDBStorage) else None
        self._trials: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self._storage is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def add(self, trial_id: int) -> None:
        """Records heartbeats for a trial from now on."""
        self._trials.add(trial_id)
        if self._storage is not None:
            self._storage.record_heartbeat(trial_id)

    def remove(self, trial_id: int) -> None:
        """Records no more heartbeats for a trial."""
        self._trials.discard(trial_id)

    def _beat(self) -> None:
        assert self._storage is not None
        interval = self._storage.get_heartbeat_interval()
        while not self._stop.wait(interval):
            for trial_id in list(self._trials):
                self._storage.record_heartbeat(trial_id)
        self._storage.remove_session()
