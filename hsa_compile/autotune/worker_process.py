"""The near side of isolation: starts a worker, asks it with a time limit, and says of what it died."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from typing import Any

from hsa_compile import errors
from hsa_compile.errors import CandidateCrashed, CandidateError, HSACompileError, OutOfResources, TimedOut

# Not multiprocessing's own start method: it runs the caller's main module anew, which a script without a
# `__name__` guard, or one from standard input, does not survive.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1])\nfrom hsa_compile.autotune.worker import serve\n"
_START_S = 300.0
_DEATH_S = 10.0  # between a closed connection and the end of its process


class WorkerProcess:
    """One worker in a session of its own, so that neither Ctrl-C nor its death reaches anybody else.

    Args:
        factory: `module:function` that opens the bench there.
        arguments: of the factory, picklable.
        memory_bytes: what it may map beyond what it needs to start; None for no limit.

    Raises:
        HSACompileError: it does not start, or the factory fails.
    """

    def __init__(self, factory: str, arguments: tuple[Any, ...], memory_bytes: int | None = None) -> None:
        self._connection, theirs = Pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        handle = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{_BOOT}serve(int(sys.argv[2]))", json.dumps(sys.path), str(handle)],
            pass_fds=(handle,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            start_new_session=True,
        )
        theirs.close()
        self._opening: tuple[Any, ...] | None = (factory, arguments, memory_bytes)
        self._connection.send(self._opening)

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return not self._connection.closed

    def wait_until_open(self) -> None:
        """Returns when the bench is open.

        Raises:
            HSACompileError: it cannot be opened.
        """
        if self._opening is None:
            return
        try:
            self._receive(_START_S)
        except HSACompileError as error:
            raise HSACompileError(f"a worker process cannot start: {error}") from error
        self._opening = None

    def call(self, verb: str, *arguments: Any, timeout_s: float) -> Any:
        """What the bench returns for a verb.

        Raises:
            HSACompileError: what the bench raised, by its own name.
            TimedOut: it took too long, and was killed.
            OutOfResources, CandidateCrashed, CandidateError: it died.
        """
        self.wait_until_open()
        try:
            self._connection.send((verb, arguments))
        except OSError as error:  # it died since it answered last
            raise self._death() from error
        return self._receive(timeout_s)

    def close(self) -> None:
        """Kills the process and all that it started; may be called again, and from another thread."""
        with contextlib.suppress(ProcessLookupError):  # it is gone, with all that it started
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._stderr.close()

    def _receive(self, timeout_s: float) -> Any:
        try:
            if not self._connection.poll(timeout_s):
                self.close()
                raise TimedOut(f"killed after {timeout_s:.0f} s")
            kind, *content = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if kind == "done":
            return content[0]
        name, message = content
        raise getattr(errors, name)(message)

    def _death(self) -> HSACompileError:
        """Why the process ended."""
        try:
            code = self._process.wait(_DEATH_S)
        except subprocess.TimeoutExpired:
            self.close()
            return CandidateCrashed("its process closed the connection")
        last = self._last_line()
        self.close()
        if code == -signal.SIGKILL:
            return OutOfResources("its process was killed, as Linux does where memory runs out")
        if code < 0:
            return CandidateCrashed(f"its process died of {signal.Signals(-code).name}")
        if code == 1 and last:
            return CandidateError(last)
        return CandidateCrashed(f"its process left with code {code}")

    def _last_line(self) -> str:
        """Of standard error: the error, where the process ended with a traceback."""
        if self._stderr.closed:
            return ""
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - 4000))
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""
