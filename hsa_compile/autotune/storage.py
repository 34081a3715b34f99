"""Where studies are kept: Optuna's own storages, opened so that a killed process leaves nothing that stops the next."""

import contextlib
import os
import time
import warnings
from pathlib import Path
from typing import cast

import filelock
import optuna
import sqlalchemy
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from hsa_compile.errors import InvalidArgument, MissingDependency, StorageError
from hsa_compile.paths import schedule_dir
from hsa_compile.target import Target

SCHEMES = ("postgresql", "mysql", "sqlite")
HEARTBEAT_S = 10
GRACE_S = 60  # without a heartbeat: then a trial's process is taken for dead
MAX_RETRIES = 2  # of a trial whose process died

_SQLITE_TIMEOUT_S = 60
_ATTEMPTS = 5  # to open a database whose tables somebody else is making
_DRIVERS = {
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "pymysql",
}


def default_storage(target: Target) -> str:
    """The journal file of a device's studies, beside its schedules."""
    return str(schedule_dir() / "studies" / f"{target.slug}.journal")


def open_storage(address: str | None) -> BaseStorage:
    """The storage at an address; None is this process's memory.

    Args:
        address: `postgresql://…`, `mysql://…`, `sqlite:///FILE`, each perhaps with a driver (`mysql+pymysql://…`),
            or a path that ends in `.journal`.

    Raises:
        InvalidArgument: the address is none of these.
        MissingDependency: the database's driver is not installed.
        StorageError: the file or database cannot be opened.
    """
    if address is None:
        return InMemoryStorage()
    check_address(address)
    return _open_database(address) if "://" in address else _open_journal(Path(address))


def close_storage(storage: BaseStorage) -> None:
    """Lets go of a database's connections; the other storages hold nothing."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def check_address(address: str) -> None:
    """Whether an address is of a kind that `open_storage` knows.

    Raises:
        InvalidArgument: it is not.
    """
    scheme, separator, _ = address.partition("://")
    if not (scheme.partition("+")[0] in SCHEMES if separator else address.endswith(".journal")):
        raise InvalidArgument(
            f"storage {address!r} is not known; allowed are postgresql://…, mysql://…, sqlite:///… and FILE.journal"
        )


def lock_of(storage: BaseStorage, address: str | None) -> contextlib.AbstractContextManager[object]:
    """What processes that share a journal file hold while they take over trials; others have no need of it."""
    if address is not None and isinstance(storage, JournalStorage):
        return filelock.FileLock(f"{address}.adopt.lock")
    return contextlib.nullcontext()


class _FileLock:
    """Optuna's journal lock by the operating system, which frees it when its holder is killed.

    Optuna's own locks are files that a killed process leaves behind: the next one would wait for half a minute.
    """

    def __init__(self, path: Path) -> None:
        self._lock = filelock.FileLock(f"{path}.flock")

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


def _open_journal(path: Path) -> JournalStorage:
    lock = _FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        try:
            _cut_torn_line(path)
        finally:
            lock.release()
        return JournalStorage(JournalFileBackend(str(path), lock_obj=cast(JournalFileOpenLock, lock)))
    except OSError as error:
        raise StorageError(f"journal {path} cannot be opened: {error.strerror or error}") from error
    except ValueError as error:
        raise StorageError(f"journal {path} is damaged: {error}") from error


def _cut_torn_line(path: Path) -> None:
    """Removes a last line that was not written to its end; the next would be glued to it, and neither be readable."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)
            os.fsync(file.fileno())


def _open_database(address: str) -> RDBStorage:
    try:
        url = sqlalchemy.engine.make_url(address)
    except sqlalchemy.exc.ArgumentError as error:
        raise InvalidArgument(f"storage {address!r} is not an address of a database") from error
    shown = url.render_as_string(hide_password=True)
    for attempt in range(_ATTEMPTS):
        try:
            return _connect(address, sqlite=url.get_backend_name() == "sqlite")
        except ImportError as error:
            missing = getattr(error.__cause__, "name", None) or error.name or ""
            package = _DRIVERS.get(missing, missing or "the database's driver")
            raise MissingDependency(f"storage {shown} needs a driver: pip install {package}") from error
        except sqlalchemy.exc.SQLAlchemyError as error:
            # Of several that come first to an empty database, all but one find its tables half made.
            if not _is_being_made(error) or attempt == _ATTEMPTS - 1:
                raise StorageError(f"storage {shown} does not answer: {str(error).splitlines()[0]}") from error
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _connect(address: str, *, sqlite: bool) -> RDBStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return RDBStorage(
            address,
            engine_kwargs={"connect_args": {"timeout": _SQLITE_TIMEOUT_S}} if sqlite else {},
            heartbeat_interval=HEARTBEAT_S,
            grace_period=GRACE_S,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
        )


def _is_being_made(error: sqlalchemy.exc.SQLAlchemyError) -> bool:
    """Whether another process made a table, or wrote the one row that says its version, a moment before."""
    return isinstance(error, sqlalchemy.exc.IntegrityError) or (
        isinstance(error, sqlalchemy.exc.DBAPIError) and "already exists" in str(error)
    )
