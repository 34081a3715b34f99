"""A long file's new entries go to lines beside it: whole at every moment, whoever is killed, however many write."""

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import forked
import pytest

from hsa_compile.errors import CacheError
from hsa_compile.files import append_line
from hsa_compile.schedules import store
from hsa_compile.schedules.cache import ScheduleCache
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.store import journal_path, journal_size, read_lines, read_records

MakeRecord = Callable[..., TuningRecord]
OpenCache = Callable[..., ScheduleCache]


@pytest.fixture
def short_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two entries make a file long."""
    monkeypatch.setattr(store, "JOURNAL_ABOVE", 4000)


def head_dims(cache: ScheduleCache) -> set[int]:
    return {record.problem.head_dim for _, record in cache.entries()}


@pytest.fixture
def stored(short_files: None, make_record: MakeRecord, open_cache: OpenCache) -> Path:
    """A file of two entries and a journal of two."""
    cache = open_cache()
    for head_dim in (32, 64, 96, 128):
        path = cache.put(make_record(head_dim=head_dim))
    assert (len(json.loads(path.read_text())["entries"]), len(read_lines(path))) == (2, 2)
    return path


def test_a_long_file_is_not_rewritten_by_a_put_and_takes_the_journal_in_when_that_is_as_long(
    short_files: None, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    cache = open_cache()
    rewritten, before = [], b""
    for head_dim in range(1, 41):
        path = cache.put(make_record(head_dim=head_dim))
        if path.read_bytes() != before:
            rewritten.append(head_dim)
            assert journal_size(path) == 0
        before = path.read_bytes()
        assert head_dims(open_cache()) == set(range(1, head_dim + 1))
    steps = [later / earlier for earlier, later in itertools.pairwise(rewritten[3:])]
    assert len(rewritten) < 12
    assert all(step > 1.4 for step in steps)  # lengths grow by a factor, so all writing together is linear


def test_what_a_killed_writer_left_of_a_line_is_no_line_and_no_damage(
    stored: Path, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    whole = journal_path(stored).read_bytes()
    with journal_path(stored).open("ab") as file:
        file.write(whole[: len(whole) // 3])
    assert read_records(stored)[1] == []
    assert head_dims(open_cache()) == {32, 64, 96, 128}
    open_cache().put(make_record(head_dim=16))
    assert read_records(stored)[1] == []
    assert head_dims(open_cache()) == {16, 32, 64, 96, 128}


def test_a_flipped_byte_in_a_line_is_that_entrys_damage_alone(stored: Path) -> None:
    text = journal_path(stored).read_bytes()
    journal_path(stored).write_bytes(text.replace(b'"median_ms": 1.25', b'"median_ms": 1.35', 1))
    records, damages = read_records(stored)
    assert len(records) == 3
    assert len(damages) == 1
    assert "of its journal is damaged" in damages[0]


def test_a_full_disk_leaves_the_journal_as_it_was(
    stored: Path, make_record: MakeRecord, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = journal_path(stored).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CacheError, match="No space left on device"):
            open_cache().put(make_record(head_dim=16))
    assert journal_path(stored).read_bytes() == before


def test_a_journal_left_behind_does_not_undo_what_the_file_took_in(
    stored: Path, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    left = journal_path(stored).read_bytes()
    later = make_record(head_dim=128, median_ms=0.5, date="2026-03-03T04:05:06+00:00")
    while journal_size(stored):
        open_cache().put(later)
    journal_path(stored).write_bytes(left)
    times = {record.problem.head_dim: record.measurement.median_ms for _, record in open_cache().entries()}
    assert times[128] == 0.5


def test_a_clock_that_was_set_back_loses_no_put(stored: Path, make_record: MakeRecord, open_cache: OpenCache) -> None:
    earlier = make_record(head_dim=32, median_ms=0.5, date="1970-01-01T00:00:00+00:00")
    open_cache().put(earlier)  # after one of 2026, which is in the file
    assert journal_size(stored)
    times = {record.problem.head_dim: record.measurement.median_ms for _, record in open_cache().entries()}
    assert times[32] == 0.5


def test_a_file_that_was_removed_takes_its_journal_with_it(
    stored: Path, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    stored.unlink()
    assert head_dims(open_cache()) == set()
    open_cache().put(make_record(head_dim=16))
    assert head_dims(open_cache()) == {16}
    assert not journal_path(stored).exists()


def test_clear_counts_and_removes_the_journal_too(stored: Path, open_cache: OpenCache) -> None:
    assert open_cache().clear() == 4
    assert not stored.exists()
    assert not journal_path(stored).exists()


def test_lines_come_back_as_they_were_added(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    for line in (b"one", b"two"):
        append_line(journal_path(path), line)
    assert read_lines(path) == [b"one", b"two"]
    assert read_lines(tmp_path / "none.json") == []


def test_a_line_takes_the_place_of_what_a_killed_writer_left(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    append_line(journal_path(path), b"one")
    with journal_path(path).open("ab") as file:
        file.write(b"torn")
    append_line(journal_path(path), b"two")
    assert read_lines(path) == [b"one", b"two"]


def start_writers(directory: Path, record: TuningRecord, writers: int, puts: int) -> list[int]:
    """Processes that put `puts` entries each, all at once; entry numbers begin with 1."""
    directory.mkdir(exist_ok=True)

    def put_many(first: int) -> None:
        cache = ScheduleCache(directory, pretuned=directory / "none")
        while not (directory / "go").exists():
            time.sleep(0.001)
        for top_k in range(first, first + puts):
            cache.put(replace(record, problem=replace(record.problem, top_k=top_k)))

    processes = [forked.start(lambda first=1 + number * puts: put_many(first)) for number in range(writers)]
    (directory / "go").touch()
    return processes


def top_ks(path: Path) -> set[int]:
    """What a new process would read; the file must be whole."""
    records, damages = read_records(path)
    assert damages == []
    return {record.problem.top_k for record in records.values()}


@pytest.mark.parametrize(("writers", "puts"), [(3, 40), pytest.param(8, 1000, marks=pytest.mark.exhaustive)])
def test_processes_that_put_at_once_lose_nothing_and_leave_a_whole_file_at_every_moment(
    writers: int, puts: int, short_files: None, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    record = make_record()
    path = open_cache().path(record.target)
    seen = 0
    for process in start_writers(open_cache().directory, record, writers, puts):
        while not forked.has_ended(process):
            now = len(top_ks(path))
            assert now >= seen, "an entry was there and is gone"
            seen = now
            time.sleep(0.05)
        assert forked.wait(process) == 0
    assert top_ks(path) == set(range(1, writers * puts + 1))


@pytest.mark.parametrize("puts", [30, pytest.param(400, marks=pytest.mark.exhaustive)])
def test_a_writer_killed_at_a_random_moment_leaves_a_whole_file_with_all_that_others_put(
    puts: int, short_files: None, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    record = make_record()
    path = open_cache().path(record.target)
    victim, survivor = start_writers(open_cache().directory, record, 2, puts)
    while len(top_ks(path)) < puts // 2:
        time.sleep(0.001)
    os.kill(victim, signal.SIGKILL)
    assert forked.wait(survivor) == 0
    forked.wait(victim)
    kept = top_ks(path)
    assert set(range(puts + 1, 2 * puts + 1)) <= kept
    of_victim = {number for number in kept if number <= puts}
    assert of_victim == set(range(1, 1 + len(of_victim)))  # every put that ended, and no other
    open_cache().put(replace(record, problem=replace(record.problem, top_k=9000)))
    assert top_ks(path) == {*kept, 9000}
