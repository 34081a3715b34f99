"""The storages that keep studies, Optuna's own, opened so that a killed process does not stop the next one.

A study is found in its storage by the question that its search answers.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock
import optuna
import sqlalchemy
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.storages.journal._storage import JournalStorageReplayResult

from hsa_compile.autotune.options import DATABASES, PROXY, check_address
from hsa_compile.autotune.study.trials import check_attributes
from hsa_compile.checks import shown
from hsa_compile.errors import CacheWarning, InvalidArgument, MissingDependency, StorageError, warn_user
from hsa_compile.files import MOST_LINE_BYTES, append_line, open_regular, parse_json, read_lines
from hsa_compile.paths import make_cache_dir, schedule_dir
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import source_version
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions

# The attributes of a study that say when its search ended, and what the record is that it ended with.
FINISHED, RECORD = "finished", "record"
METRIC = "time / default"  # the name that Optuna's own plots and dashboard have for a trial's value
HEARTBEAT_S = 10
GRACE_S = 60  # after so long without a heartbeat, a trial's process is taken for dead
MAX_RETRIES = 2  # how often a trial whose process died is tried again

_SQLITE_TIMEOUT_S = 60
_PROXY_TIMEOUT_S = 10
_ATTEMPTS = 5  # how often to try to open a database whose tables somebody else is making
_DRIVERS = {
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "pymysql",
}


# What a damaged line of a journal raises when it is replayed, and the operation that takes its place: it is about a
# trial that there is not, so Optuna passes over it.
_DAMAGES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
    optuna.exceptions.OptunaError,
)  # fmt: skip
_NOTHING: dict[str, Any] = {"op_code": 8, "worker_id": "", "trial_id": -1, "user_attr": {"": 0}}


def default_storage(target: Target) -> str:
    """Returns the path of the journal of a device's studies, beside its schedules."""
    return str(schedule_dir() / "studies" / f"{target.slug}.journal")


def open_storage(address: str | None) -> BaseStorage:
    """Opens the storage at an address; None stands for this process's memory.

    Args:
        address: `postgresql://…`, `mysql://…`, `sqlite:///FILE`, each perhaps with a driver (`mysql+pymysql://…`);
            `grpc://HOST:PORT` for Optuna's proxy, which asks a database for many workers
            (`optuna.storages.run_grpc_proxy_server`); or a path that ends in `.journal`.

    Raises:
        InvalidArgument: the address is none of these.
        MissingDependency: the database's driver is not installed.
        StorageError: the file or database cannot be opened.
    """
    if address is None:
        return InMemoryStorage()
    check_address(address)
    if address.startswith(f"{PROXY}://"):
        return _open_proxy(address)
    return _open_database(address) if "://" in address else _open_journal(Path(address))


def open_to_read(address: str) -> BaseStorage:
    """Opens a storage that is there already, and changes nothing in it: no file, no table, no line that was torn.

    Args:
        address: as for `open_storage`.

    Raises:
        InvalidArgument: the address is of no known kind, or there is no such file; the message names those that are.
        MissingDependency, StorageError: as for `open_storage`.
    """
    check_address(address)
    if address.startswith(f"{PROXY}://"):
        return _open_proxy(address)
    path = _file_of(address)
    if path is not None and not path.is_file():
        found = (
            ", ".join(map(str, sorted((schedule_dir() / "studies").glob("*.journal")))) or "none on this machine yet"
        )
        raise InvalidArgument(f"storage {address} does not exist; hsa-compile tune makes one; there are: {found}")
    if "://" in address:
        return _open_database(address, to_read=True)
    return JournalStorage(_Journal(Path(address)))


def _file_of(address: str) -> Path | None:
    """Returns the file that a storage is in; None for a server."""
    if "://" not in address:
        return Path(address)
    url = sqlalchemy.engine.make_url(address)
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def close_storage(storage: BaseStorage) -> None:
    """Closes the connections of a storage; a journal has none."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()
    elif isinstance(storage, GrpcStorageProxy):
        storage.close()


@contextlib.contextmanager
def answering(address: str | None) -> Iterator[None]:
    """Turns errors of a storage that goes away while it is in use into one of a single line.

    Raises:
        StorageError: the storage does not answer any more.
    """
    try:
        yield
    except _errors_in_use() as error:
        details = getattr(error, "details", None)  # gRPC's error has them; its text is a block of many lines
        cause = str(details() if details else error.__cause__ or error).strip().partition("\n")[0]
        raise StorageError(
            f"storage {_shown(address or '')} stopped answering: {cause}; what was finished is in it, and the same "
            "command goes on from there"
        ) from error


def lock_of(storage: BaseStorage, address: str | None) -> contextlib.AbstractContextManager[object]:
    """Returns the lock that processes of a host hold while they take over trials of a storage without heartbeats."""
    if address is not None and isinstance(storage, JournalStorage):
        return filelock.FileLock(f"{address}.adopt.lock")
    if address is not None and isinstance(storage, GrpcStorageProxy):
        path = schedule_dir() / "studies" / (re.sub(r"[^A-Za-z0-9.-]+", "-", address) + ".adopt.lock")
        make_cache_dir(path.parent)
        return filelock.FileLock(path)
    return contextlib.nullcontext()


class _Journal(BaseJournalBackend):
    """The file behind Optuna's journal: one operation a line, read as far as it is whole, and written under a lock.

    A line that Optuna could not replay, which would end each search of the device, is left out, and a warning says
    which. The lock is one that the operating system frees when its holder is killed; Optuna's own are files that stay,
    for which the next process would wait half a minute.

    Args:
        path: where the file is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = 0  # where the first line begins that was not read
        self._rehearsal = JournalStorageReplayResult("")  # replays each line before Optuna does
        self._is_ours = False  # whether one line at least could be replayed

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yields the operations from a number on; in the place of a damaged one stands one that does nothing."""
        if log_number_from != self._rehearsal.log_number_read:  # a copy of the storage reads from the beginning
            self._start, self._rehearsal = 0, JournalStorageReplayResult("")
        damages: list[str] = []
        try:
            for line in read_lines(self._path, self._start):
                if not line.endswith(b"\n") and len(line) < MOST_LINE_BYTES:
                    break  # somebody is writing it
                self._start += len(line)
                log = self._rehearsed(line, damages)
                if self._rehearsal.log_number_read > log_number_from:
                    yield log
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"journal {self._path} cannot be read: {error.strerror or error}") from error
        if damages and not self._is_ours:
            raise StorageError(
                f"journal {self._path} is damaged, or no journal: {damages[0]}; choose another --storage"
            )
        if damages:
            more = f", and so are {len(damages) - 1} more" if len(damages) > 1 else ""
            warn_user(f"journal {self._path}: {damages[0]} and left out{more}", CacheWarning)

    def _rehearsed(self, line: bytes, damages: list[str]) -> dict[str, Any]:
        """Returns the operation on a line, once it was replayed; if it cannot be, adds why to the damages."""
        number = self._rehearsal.log_number_read + 1
        try:
            log: dict[str, Any] = parse_json(line)
            check_attributes(log)
            self._rehearsal.apply_logs([log])
        except _DAMAGES as error:
            self._rehearsal.log_number_read = number
            damages.append(f"line {number} is damaged ({shown(f'{type(error).__name__}: {error}')})")
            return _NOTHING
        self._is_ours = True
        return log

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Adds operations, each on a line of its own."""
        try:
            with self.locked():
                for log in logs:
                    append_line(self._path, json.dumps(log, separators=(",", ":")).encode())
        except OSError as error:
            raise StorageError(
                f"journal {self._path} cannot be written: {error.strerror or error}; what was finished is in it, and "
                "the same command goes on from there"
            ) from error

    def locked(self) -> filelock.BaseFileLock:
        """Returns the lock that a writer holds."""
        return filelock.FileLock(f"{self._path}.flock")


def _open_journal(path: Path) -> JournalStorage:
    journal = _Journal(path)
    try:
        make_cache_dir(path.parent)
        with journal.locked():
            os.close(open_regular(path, os.O_RDWR | os.O_CREAT))
    except OSError as error:
        raise StorageError(f"journal {path} cannot be opened: {error.strerror or error}") from error
    return JournalStorage(journal)


def _open_database(address: str, *, to_read: bool = False) -> RDBStorage:
    try:
        url = sqlalchemy.engine.make_url(address)
    except sqlalchemy.exc.ArgumentError as error:
        raise InvalidArgument(f"storage {address!r} is not an address of a database") from error
    shown = _shown(address)
    for attempt in range(_ATTEMPTS):
        try:
            return _connect(address, sqlite=url.get_backend_name() == "sqlite", to_read=to_read)
        except ImportError as error:
            missing = getattr(error.__cause__, "name", None) or error.name or ""
            package = _DRIVERS.get(missing, missing or "the database's driver")
            raise MissingDependency(f"storage {shown} needs a driver: pip install {package}") from error
        except optuna.exceptions.StorageInternalError as error:  # it was opened to read, and has not Optuna's tables
            cause = str(error.__cause__ or error).partition("\n")[0]
            raise StorageError(f"storage {shown} holds no studies: {cause}") from error
        except sqlalchemy.exc.SQLAlchemyError as error:
            # If several come first to an empty database, all but one find its tables half made.
            if not _is_being_made(error) or attempt == _ATTEMPTS - 1:
                raise StorageError(f"storage {shown} does not answer: {str(error).splitlines()[0]}") from error
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _open_proxy(address: str) -> GrpcStorageProxy:
    host, _, port = address.removeprefix(f"{PROXY}://").partition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = GrpcStorageProxy(host=host, port=int(port))
        storage.wait_server_ready(timeout=_PROXY_TIMEOUT_S)
    except ImportError as error:
        raise MissingDependency(f"storage {address} needs a driver: pip install grpcio protobuf") from error
    except ConnectionError as error:
        raise StorageError(f"storage {address} does not answer within {_PROXY_TIMEOUT_S} s") from error
    return storage


def _errors_in_use() -> tuple[type[Exception], ...]:
    """Returns the errors of calls to a storage that has gone away; gRPC's are among them only if it was imported."""
    grpc = sys.modules.get("grpc")
    errors = optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError
    return (*errors, grpc.RpcError) if grpc else errors


def _shown(address: str) -> str:
    """Returns an address without its password."""
    if address.partition("://")[0].partition("+")[0] in DATABASES:
        return sqlalchemy.engine.make_url(address).render_as_string(hide_password=True)
    return address


def _connect(address: str, *, sqlite: bool, to_read: bool) -> RDBStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return RDBStorage(
            address,
            engine_kwargs={"connect_args": {"timeout": _SQLITE_TIMEOUT_S}} if sqlite else {},
            skip_table_creation=to_read,
            heartbeat_interval=HEARTBEAT_S,
            grace_period=GRACE_S,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
        )


def _is_being_made(error: sqlalchemy.exc.SQLAlchemyError) -> bool:
    """Returns whether another process made a table, or wrote the row with the version, a moment before."""
    return isinstance(error, sqlalchemy.exc.IntegrityError) or (
        isinstance(error, sqlalchemy.exc.DBAPIError) and "already exists" in str(error)
    )


def question(problem: Problem, target: Target, *, inputs: str, seed: int) -> dict[str, Any]:
    """Returns everything that a search's answer depends on, among it the packages' versions and the space's choices."""
    return {
        "problem": problem.to_dict(),
        "target": target.to_dict(),
        "source": source_version(problem, target),
        "space": {name: dict(knobs) for name, knobs in SearchSpace.of(problem, target).choices.items()},
        "inputs": inputs,
        "seed": seed,
        "versions": installed_versions(),
    }


def open_study(storage: BaseStorage, asked: Mapping[str, Any], *, anew: bool) -> optuna.Study:
    """Returns the latest study of a question if its search has not ended, else, or if `anew`, a new one.

    Args:
        storage: where studies are kept.
        asked: what `question` gave; a new study carries it.
        anew: whether to begin again in any case.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stem = _stem(asked)
    numbers = [
        int(study.study_name.removeprefix(f"{stem}."))
        for study in storage.get_all_studies()
        if study.study_name.startswith(f"{stem}.")
    ]
    latest = max(numbers, default=0)
    if latest and not anew:
        study = optuna.load_study(study_name=f"{stem}.{latest}", storage=storage)
        if FINISHED not in study.user_attrs:
            return study
    study = optuna.create_study(
        study_name=f"{stem}.{latest + 1}", storage=storage, direction="minimize", load_if_exists=True
    )
    for name, value in asked.items():
        study.set_user_attr(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([METRIC])
    return study


def finish_study(study: optuna.Study, record: Mapping[str, Any]) -> None:
    """Marks a study's search as ended, so that the next one with the same question begins anew.

    Args:
        study: the study.
        record: what the search ended with, as `TuningRecord.to_dict` gives it; a report shows it.
    """
    study.set_user_attr(RECORD, dict(record))
    study.set_user_attr(FINISHED, datetime.now(timezone.utc).isoformat(timespec="seconds"))


def _stem(asked: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return f"{asked['problem']['op']}-{digest}"
