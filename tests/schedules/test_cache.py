import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import filelock
import forked
import pytest

from hsa_compile.errors import CacheError
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import ScheduleCache, default_cache
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import NAMED_TARGETS, Target

MakeProblem = Callable[..., Problem]
MakeRecord = Callable[..., TuningRecord]
OpenCache = Callable[..., ScheduleCache]

TOKEN_1, TOKEN_4, TOKEN_16 = (Schedule.of("token", block_tokens=block) for block in (1, 4, 16))


def test_what_was_put_is_found_exactly_now_and_by_the_next_process(
    make_record: MakeRecord, open_cache: OpenCache
) -> None:
    record = make_record(schedule=TOKEN_4)
    cache = open_cache()
    assert cache.lookup(record.problem, record.target) is None
    path = cache.put(record)
    assert path == cache.path(record.target)
    for reader in (cache, open_cache()):
        found = reader.lookup(record.problem, record.target)
        assert found is not None
        assert (found.schedule, found.record, found.origin, found.distance) == (TOKEN_4, record, "user", 0.0)
        assert reader.exact(record.problem, record.target) == record


def test_a_put_replaces_the_entry_with_the_same_key_only(make_record: MakeRecord, open_cache: OpenCache) -> None:
    cache = open_cache()
    other = make_record(head_dim=128)
    for record in (make_record(median_ms=3.0, torch="2.11.0"), other, make_record(median_ms=1.0)):
        cache.put(record)
    for reader in (cache, open_cache()):
        assert sorted(record.measurement.median_ms for _, record in reader.entries()) == [1.0, 1.25]


def test_every_change_raises_the_generation(make_record: MakeRecord, open_cache: OpenCache) -> None:
    cache = open_cache()
    seen = [cache.generation]
    cache.put(make_record())
    seen.append(cache.generation)
    cache.clear()
    seen.append(cache.generation)
    assert seen == sorted(set(seen))


def test_lookup_prefers_user_exact_then_pretuned_exact_then_the_nearest(
    make_record: MakeRecord, make_problem: MakeProblem, open_cache: OpenCache, cpu: Target
) -> None:
    problem = make_problem(seq_len=4096)
    near = make_record(problem=make_problem(seq_len=8192), schedule=TOKEN_1)
    shipped = make_record(problem=problem, schedule=TOKEN_4)
    own = make_record(problem=problem, schedule=TOKEN_16)

    def found() -> tuple[str, Schedule, float] | None:
        hit = open_cache().lookup(problem, cpu)
        return hit and (hit.origin, hit.schedule, hit.distance)

    assert found() is None
    open_cache().put(near)
    assert found() == ("user", TOKEN_1, 1.5)
    open_cache(user="pretuned").put(shipped)
    assert found() == ("pretuned", TOKEN_4, 0.0)
    assert open_cache().exact(problem, cpu) is None
    open_cache().put(own)
    assert found() == ("user", TOKEN_16, 0.0)


def test_the_nearest_entry_has_the_least_distance_whoever_tuned_it(
    make_record: MakeRecord, make_problem: MakeProblem, open_cache: OpenCache, cpu: Target
) -> None:
    open_cache(user="pretuned").put(make_record(seq_len=2048, schedule=TOKEN_1))
    open_cache().put(make_record(seq_len=65536, schedule=TOKEN_4))
    open_cache().put(make_record(seq_len=1 << 20, schedule=TOKEN_16))
    cache = open_cache()
    expected = {1024: TOKEN_1, 4096: TOKEN_1, 32768: TOKEN_4, 131072: TOKEN_4, 1 << 19: TOKEN_16}
    for seq_len, schedule in expected.items():
        hit = cache.lookup(make_problem(seq_len=seq_len), cpu)
        assert hit is not None
        assert hit.schedule == schedule, seq_len
        assert hit.distance > 0


def test_the_users_entry_wins_at_equal_distance(
    make_record: MakeRecord, make_problem: MakeProblem, open_cache: OpenCache, cpu: Target
) -> None:
    open_cache(user="pretuned").put(make_record(seq_len=2048, schedule=TOKEN_1))
    open_cache().put(make_record(seq_len=8192, schedule=TOKEN_4))
    hit = open_cache().lookup(make_problem(seq_len=4096), cpu)
    assert hit is not None
    assert hit.origin == "user"


def test_a_measured_entry_comes_before_any_predicted_one(
    make_record: MakeRecord, make_problem: MakeProblem, open_cache: OpenCache, cpu: Target
) -> None:
    problem = make_problem(seq_len=4096)

    def found() -> tuple[str, float, Schedule]:
        hit = open_cache().lookup(problem, cpu)
        assert hit is not None
        return hit.record.kind, hit.distance, hit.schedule

    open_cache(user="pretuned").put(make_record(problem=make_problem(seq_len=8192), schedule=TOKEN_1, kind="predicted"))
    assert found() == ("predicted", 1.5, TOKEN_1)
    open_cache().put(make_record(problem=problem, schedule=TOKEN_4, kind="predicted"))
    assert found() == ("predicted", 0.0, TOKEN_4)
    open_cache().put(make_record(problem=make_problem(seq_len=65536), schedule=TOKEN_16))
    assert found() == ("measured", 6.0, TOKEN_16)
    assert open_cache().exact(problem, cpu) is None
    assert open_cache().exact(problem, cpu, "predicted") is not None


def test_a_prediction_never_replaces_a_measurement_of_the_same_key(
    make_record: MakeRecord, make_problem: MakeProblem, open_cache: OpenCache, cpu: Target
) -> None:
    predicted, measured = make_record(schedule=TOKEN_1, kind="predicted"), make_record(schedule=TOKEN_4)
    for order in ((predicted, measured, predicted), (measured, predicted)):
        cache = open_cache()
        cache.clear()
        for record in order:
            cache.put(record)
        for reader in (cache, open_cache()):
            assert [(record.kind, record.schedule) for _, record in reader.entries()] == [("measured", TOKEN_4)]


def test_half_a_search_never_replaces_a_whole_one_of_the_same_key_whoever_put_it(
    make_record: MakeRecord, open_cache: OpenCache
) -> None:
    whole = make_record(schedule=TOKEN_4)
    half = replace(make_record(schedule=TOKEN_1, date="2026-09-09T00:00:00+00:00"), complete=False)
    open_cache().put(half)
    ours, others = open_cache(), open_cache()
    others.put(whole)
    ours.put(half)  # it does not know what the other process put
    assert [record for _, record in open_cache().entries()] == [whole]
    assert others.merge([half]).kept == 1
    assert [record for _, record in open_cache().entries()] == [whole]
    others.remove(whole)
    others.put(half)
    assert others.merge([whole]).replaced == 1  # although it is older
    assert [record for _, record in open_cache().entries()] == [whole]


def test_half_a_search_replaces_a_whole_one_that_can_serve_no_more(
    make_record: MakeRecord, open_cache: OpenCache
) -> None:
    useless = make_record(schedule=Schedule.of("token", block_tokens=5))
    half = replace(make_record(schedule=TOKEN_1), complete=False)
    cache = open_cache()
    cache.put(useless)
    cache.put(half)
    assert [record for _, record in open_cache().entries()] == [half]


def test_an_answer_is_forgotten_when_something_better_is_put(
    make_record: MakeRecord, make_problem: MakeProblem, open_cache: OpenCache, cpu: Target
) -> None:
    cache, problem = open_cache(), make_problem(seq_len=4096)
    assert cache.lookup(problem, cpu) is None
    for record, distance in ((make_record(seq_len=8192), 1.5), (make_record(seq_len=4096), 0.0)):
        cache.put(record)
        hit = cache.lookup(problem, cpu)
        assert hit is not None
        assert hit.distance == distance
        assert cache.lookup(problem, cpu) is hit


def test_a_schedule_of_a_longer_sequence_is_cut_to_a_shorter_one(
    make_record: MakeRecord, make_problem: MakeProblem, open_cache: OpenCache, cpu: Target
) -> None:
    cache = open_cache()
    cache.put(make_record(seq_len=65536, schedule=Schedule.of("chunk", super_tile=65536, tile_rows=16384)))
    hit = cache.lookup(make_problem(seq_len=1000), cpu)
    assert hit is not None
    assert hit.schedule["super_tile"] <= 1024
    assert hit.record.schedule["super_tile"] == 65536


def test_a_near_entry_that_the_problem_cannot_use_gives_way_to_the_next(
    make_record: MakeRecord, make_problem: MakeProblem, open_cache: OpenCache, cpu: Target
) -> None:
    cache = open_cache()
    cache.put(make_record(seq_len=8192, schedule=Schedule.of("diagonal", width=3)))
    problem = make_problem(seq_len=4096)
    assert cache.lookup(problem, cpu) is None
    assert "cannot use" in cache.explain_miss(problem, cpu)
    cache.put(make_record(seq_len=65536, schedule=TOKEN_4))
    hit = cache.lookup(problem, cpu)
    assert hit is not None
    assert hit.schedule == TOKEN_4


def test_an_exact_entry_of_a_version_with_other_knobs_counts_as_none(
    make_record: MakeRecord, open_cache: OpenCache
) -> None:
    record = make_record(schedule=Schedule.of("token", block_tokens=4, colour="red"))
    open_cache().put(record)
    assert open_cache().lookup(record.problem, record.target) is None
    assert open_cache().exact(record.problem, record.target) is None


def test_a_miss_and_a_hit_explain_themselves(
    make_record: MakeRecord, make_problem: MakeProblem, open_cache: OpenCache, cpu: Target
) -> None:
    cache = open_cache()
    problem = make_problem()
    assert cache.explain_miss(problem, cpu) == "nothing has been tuned yet"
    cache.put(make_record(head_dim=128, chunk_size=32))
    cache.put(make_record(dtype="float32", head_dim=128, chunk_size=32))
    assert cache.explain_miss(problem, cpu).endswith("must match: head_dim, value_dim, chunk_size")
    cache.put(make_record(seq_len=8192))
    assert "at distance 1.50 by the user entry (measured) for" in cache.explain_miss(problem, cpu)
    cache.put(make_record())
    assert "served exactly by the user entry (measured) for" in cache.explain_miss(problem, cpu)


def test_the_file_is_json_that_a_person_can_read(make_record: MakeRecord, open_cache: OpenCache) -> None:
    record = make_record(schedule=TOKEN_4)
    path = open_cache().put(record)
    assert path.name == f"{record.target.slug}.json"
    assert path.read_text().count("\n") > 20
    content = json.loads(path.read_text())
    (entry,) = content["entries"]
    assert isinstance(content["version"], int)
    assert "hsa-compile" in content["format"]
    assert entry["key"]["device"] == "Test CPU"
    assert entry["key"]["seq_len"] == 4096
    assert entry["key"]["torch"] == "2.13.0"
    stored = entry["record"]
    assert stored["schedule"] == {"dataflow": "token", "block_tokens": 4}
    assert stored["measurement"] == {"median_ms": 1.25, "p20_ms": 1.25, "p80_ms": 1.25, "repeats": 15}
    assert stored["default_measurement"]["median_ms"] == 2.5
    assert set(stored["versions"]) == {"torch", "triton", "optuna", "hsa-compile"}
    assert stored["date"] == record.date
    assert stored["inputs"] == "random"
    assert (stored["trials"], stored["failures"]) == (12, {"WrongResult": 1})


def test_each_device_has_a_file_of_its_own(make_record: MakeRecord, open_cache: OpenCache, cpu: Target) -> None:
    cache = open_cache()
    paths = {cache.put(make_record(target=target)) for target in (cpu, *NAMED_TARGETS.values())}
    assert len(paths) == 1 + len(NAMED_TARGETS)
    assert sorted(path.name for path in cache.directory.glob("*.json")) == sorted(path.name for path in paths)


def test_entries_that_another_process_put_are_not_lost(make_record: MakeRecord, open_cache: OpenCache) -> None:
    mine, theirs = open_cache(), open_cache()
    theirs.put(make_record(head_dim=128))
    mine.put(make_record(head_dim=64))
    theirs.put(make_record(head_dim=32))
    assert {record.problem.head_dim for _, record in open_cache().entries()} == {32, 64, 128}


def test_clear_removes_one_devices_entries_or_all_and_never_the_pretuned(
    make_record: MakeRecord, open_cache: OpenCache, cpu: Target, gpu: Target
) -> None:
    open_cache(user="pretuned").put(make_record(dtype="float32"))
    cache = open_cache()
    for record in (make_record(), make_record(head_dim=128), make_record(target=gpu)):
        cache.put(record)
    assert cache.clear(replace(cpu, num_cores=64)) == 2
    assert cache.clear(cpu) == 0
    for reader in (cache, open_cache()):
        assert [(origin, record.target.kind) for origin, record in reader.entries()] == [
            ("user", "cuda"),
            ("pretuned", "cpu"),
        ]
    assert cache.clear() == 1
    assert [origin for origin, _ in open_cache().entries()] == ["pretuned"]


def test_a_directory_that_cannot_be_made_is_a_cache_error(make_record: MakeRecord, tmp_path: Path, cpu: Target) -> None:
    (tmp_path / "taken").write_text("a file where the directory should be")
    cache = ScheduleCache(tmp_path / "taken", pretuned=tmp_path / "none")
    with pytest.raises(CacheError, match=rf"{tmp_path}/taken/.*\.json cannot be written"):
        cache.put(make_record())
    assert cache.lookup(make_record().problem, cpu) is None
    assert cache.generation == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_that_may_not_be_written_is_a_cache_error(make_record: MakeRecord, open_cache: OpenCache) -> None:
    cache = open_cache()
    path = cache.put(make_record())
    before = path.read_bytes()
    path.parent.chmod(0o500)
    try:
        with pytest.raises(CacheError, match="cannot be written"):
            cache.put(make_record(head_dim=128))
    finally:
        path.parent.chmod(0o700)
    assert path.read_bytes() == before


# The calls of a put that touch the disk. Python 3.10 has a replacement of its own for os.replace in Path.replace.
DISK_CALLS = pytest.mark.parametrize(("owner", "step"), [(os, "fsync"), (Path, "replace")], ids=["fsync", "replace"])


@DISK_CALLS
def test_a_full_disk_is_a_cache_error_and_leaves_the_old_file_alone(
    owner: object, step: str, make_record: MakeRecord, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache()
    path = cache.put(make_record())
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, full)
        with pytest.raises(CacheError, match="No space left on device"):
            cache.put(make_record(head_dim=128))
    assert path.read_bytes() == before
    assert {child.name for child in path.parent.iterdir()} <= {path.name, f"{path.name}.lock"}
    assert len(list(cache.entries())) == 1
    cache.put(make_record(head_dim=128))
    assert len(list(open_cache().entries())) == 2


def test_a_lock_that_is_never_released_is_a_cache_error(
    make_record: MakeRecord, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache()
    path = cache.put(make_record())
    before = path.read_bytes()
    monkeypatch.setattr("hsa_compile.schedules.cache.LOCK_TIMEOUT_S", 0.1)
    with (
        filelock.FileLock(path.with_name(f"{path.name}.lock")),
        pytest.raises(CacheError, match="locked by another process"),
    ):
        cache.put(make_record(head_dim=128))
    assert path.read_bytes() == before


def test_two_processes_that_put_at_once_lose_nothing(
    make_record: MakeRecord, make_problem: MakeProblem, open_cache: OpenCache
) -> None:
    directory = open_cache().directory
    directory.mkdir()

    def put_some(first: int) -> None:
        cache = open_cache()
        while not (directory / "go").exists():
            time.sleep(0.001)
        for head_dim in range(first, first + 25):
            cache.put(make_record(head_dim=head_dim))

    writers = [forked.start(lambda first=first: put_some(first)) for first in (1, 101)]
    (directory / "go").touch()
    assert [forked.wait(writer) for writer in writers] == [0, 0]
    stored = {record.problem.head_dim for _, record in open_cache().entries()}
    assert stored == {*range(1, 26), *range(101, 126)}


@DISK_CALLS
def test_a_process_killed_in_the_middle_of_a_put_leaves_a_whole_file(
    owner: object, step: str, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    path = open_cache().put(make_record())
    before = path.read_bytes()

    def put_and_die() -> None:
        setattr(owner, step, lambda *_: forked.die())
        open_cache().put(make_record(head_dim=1))

    assert forked.wait(forked.start(put_and_die)) == -signal.SIGKILL
    assert path.read_bytes() == before
    cache = open_cache()
    cache.put(make_record(head_dim=128))
    assert {record.problem.head_dim for _, record in open_cache().entries()} == {64, 128}


def test_the_default_cache_is_one_a_directory_and_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = default_cache()
    assert first is default_cache()
    assert first.directory == tmp_path / "cache" / "schedules"
    monkeypatch.setenv("HSA_COMPILE_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert default_cache().directory == tmp_path / "elsewhere" / "schedules"
    assert not (tmp_path / "elsewhere").exists()
