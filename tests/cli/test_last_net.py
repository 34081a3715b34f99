"""Whatever happens within a command, a person meets one line and an exit code."""

import errno
import os
import signal
from collections.abc import Callable

import pytest
from shell import SHAPE, Shell

from hsa_compile.log import logger
from hsa_compile.problem import OPS

TUNE = ["tune", *SHAPE, "--device", "cpu", "--trials", "5", "--timeout", "600", "--in-process"]


def raising(error: BaseException) -> Callable[..., object]:
    def entries(*_: object) -> object:
        raise error

    return entries


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/some/file"), "/some/file: Permission denied"),
        (TypeError("no\nint"), "TypeError: no int; hsa-compile does not foresee this"),
        (RecursionError("x" * 10_000), f"RecursionError: {'x' * 500}…; hsa-compile does not foresee this"),
        (OSError("\x1b[2J\u202e"), r"OSError: \x1b[2J\u202e; hsa-compile does not foresee this"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_nobody_foresaw_is_one_line_and_a_traceback_for_who_asks(
    error: Exception, line: str, run: Shell, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hsa_compile.schedules.cache.ScheduleCache.entries", raising(error))
    outcome = run("schedules", "list")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith(f"error: {line}")
    assert len(outcome.err.splitlines()) == 1
    with caplog.at_level("DEBUG", logger.name):
        run("schedules", "list")
    assert caplog.records[-1].exc_info
    assert caplog.records[-1].exc_info[1] is error


def test_sigterm_ends_a_command_as_ctrl_c_does_and_a_handler_of_the_caller_stays(
    run: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hsa_compile.schedules.cache.ScheduleCache.entries", lambda cache: os.kill(os.getpid(), signal.SIGTERM) or ()
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        outcome = run("schedules", "list")
        assert outcome.code == 143
        assert outcome.err.splitlines()[-1].startswith("error: interrupted; what was finished is stored")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert run("schedules", "list").code == 0
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\u202egpj", "\udcff"])
def test_a_name_that_moves_the_cursor_is_shown_as_plain_characters(name: str, run: Shell) -> None:
    for arguments in (["schedules", "import", name], ["emit", "--target", name], ["schedules", name]):
        outcome = run(*arguments)
        assert outcome.code in (1, 2)
        assert len(outcome.err.splitlines()) == 1
        assert outcome.err.strip().isprintable()


@pytest.mark.parametrize(
    "whole", [0, pytest.param(1, marks=pytest.mark.exhaustive), 4, pytest.param(9, marks=pytest.mark.exhaustive)]
)
def test_a_disk_that_fills_up_ends_a_search_in_one_line_and_the_next_goes_on(
    whole: int, run: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def fsync(handle: int) -> None:
        synced.append(handle)
        if len(synced) > whole:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        outcome = run(*TUNE)
    assert outcome.code == 1
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "No space left on device" in last
    assert "Traceback" not in outcome.err
    assert run(*TUNE).code == 0
    assert [entry["problem"]["op"] for entry in run("schedules", "list", "--json").json] == [*OPS, "select_chunks"]
