"""Signs of life for the trials of this process, in storages that take a silent trial's process for dead."""

import threading
from types import TracebackType

from optuna.storages import BaseStorage, RDBStorage


class Heartbeat:
    """Beats for each trial that was added, from a thread, while the context is open; idle where nobody listens.

    Optuna beats by itself within `Study.optimize` alone; here trials are asked for ahead and told later.

    Args:
        storage: of the study.
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
        """Beats for a trial from now on."""
        self._trials.add(trial_id)
        if self._storage is not None:
            self._storage.record_heartbeat(trial_id)

    def remove(self, trial_id: int) -> None:
        """Beats for it no more."""
        self._trials.discard(trial_id)

    def _beat(self) -> None:
        assert self._storage is not None
        interval = self._storage.get_heartbeat_interval()
        while not self._stop.wait(interval):
            for trial_id in list(self._trials):
                self._storage.record_heartbeat(trial_id)
        self._storage.remove_session()
