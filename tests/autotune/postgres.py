"""A PostgreSQL server for one test, in a directory of its own."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def binaries() -> Path | None:
    """Where initdb and pg_ctl lie; Debian keeps them off the path."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if found := shutil.which("initdb"):
        places.append(Path(found).parent)
    return next((place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()), None)


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The address of a fresh database, gone afterwards; skips where there is no server to start."""
    pytest.importorskip("psycopg", reason="no driver: pip install 'psycopg[binary]'")
    place = binaries()
    if place is None:
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    command: list[str] = []
    directory = Path(tempfile.mkdtemp(prefix="hsa-compile-postgres-"))
    if os.getuid() == 0:  # which the server refuses to run as
        if "postgres" not in {user.pw_name for user in pwd.getpwall()} or shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres or no runuser on the PATH")
        shutil.chown(directory, "postgres")
        command = ["runuser", "-u", "postgres", "--"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = directory / "data"
    options = f"-p {port} -k {directory} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        _run(*command, str(place / "initdb"), "-D", str(data), "-A", "trust", "-U", "tuner")
        _run(
            *command, str(place / "pg_ctl"), "-D", str(data), "-l", str(directory / "log"), "-o", options, "-w", "start"
        )
        try:
            yield f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"
        finally:
            _run(*command, str(place / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run(*command: str) -> None:
    # Not captured through a pipe: the server would keep it open.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd="/", timeout=120)
        output.seek(0)
        assert done.returncode == 0, output.read().decode()
