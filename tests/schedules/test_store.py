"""Files that are damaged, cut short, foreign or unreadable: a warned miss, never a crash, never a loss."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hsa_compile
from hsa_compile.errors import CacheError, CacheWarning, UntunedWarning
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import ScheduleCache, default_cache
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.space import default_schedule
from hsa_compile.schedules.store import FORMAT, VERSION, checksum
from hsa_compile.target import Target

MakeRecord = Callable[..., TuningRecord]
OpenCache = Callable[..., ScheduleCache]

CUTS = 20  # places at which a file is truncated


def open_warned(open_cache: OpenCache, path: Path) -> ScheduleCache:
    """Opens the cache; there must be exactly one warning, and it must name the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = open_cache()
    assert [warning.category for warning in caught] == [CacheWarning]
    assert str(path) in str(caught[0].message)
    assert "\n" not in str(caught[0].message)
    return cache


def head_dims(cache: ScheduleCache) -> set[int]:
    return {record.problem.head_dim for _, record in cache.entries()}


@pytest.fixture
def stored(make_record: MakeRecord, open_cache: OpenCache) -> Path:
    """A file of three entries, head dims 32, 64 and 128."""
    for head_dim in (32, 64, 128):
        path = open_cache().put(make_record(head_dim=head_dim))
    return path


def edited(text: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(text), **changes}).encode()


def with_entry(text: bytes, number: int, value: Any) -> bytes:
    entries = json.loads(text)["entries"]
    return edited(text, entries=[value if i == number else entry for i, entry in enumerate(entries)])


def with_record(text: bytes, **changes: Any) -> bytes:
    """Changes the first record and makes its checksum fit again."""
    entry = json.loads(text)["entries"][0]
    body = {"key": entry["key"], "record": {**entry["record"], **changes}}
    return with_entry(text, 0, {**body, "checksum": checksum(body)})


WHOLE_FILE_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "text": lambda text: b"once upon a time",
    "zeros": lambda text: bytes(len(text)),
    "not utf-8": lambda text: b"\xff\xfe" + text,
    "a list": lambda text: b"[1, 2, 3]",
    "null": lambda text: b"null",
    "a number of 5000 digits": lambda text: b"9" * 5000,
    "deeply nested": lambda text: b"[" * 200_000,
    "another format": lambda text: edited(text, format="somebody's settings"),
    "no format": lambda text: b"{}",
    "an older version": lambda text: edited(text, version=VERSION - 1),
    "a newer version": lambda text: edited(text, version=VERSION + 1),
    "no version": lambda text: json.dumps({"format": FORMAT, "entries": []}).encode(),
    "entries that are no list": lambda text: edited(text, entries={"a": 1}),
    "two copies in a row": lambda text: text + text,
}

ENTRY_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a flipped digit in a time": lambda text: text.replace(b'"p80_ms": 1.25', b'"p80_ms": 1.35', 1),
    "a flipped digit in the key": lambda text: text.replace(b'"head_dim": 32', b'"head_dim": 33', 1),
    "another schedule": lambda text: text.replace(b'"dataflow": "', b'"dataflow": "x', 1),
    "another checksum": lambda text: text.replace(b'"checksum": "', b'"checksum": "0', 1),
    "a number beyond all bounds": lambda text: with_record(text, trials=float("inf")),
    "a date that is no text": lambda text: with_record(text, date="\ud800"),
    "null": lambda text: with_entry(text, 0, None),
    "a number": lambda text: with_entry(text, 0, 7),
    "an empty mapping": lambda text: with_entry(text, 0, {}),
    "a record that is a list": lambda text: with_entry(text, 0, {"key": {}, "record": [], "checksum": "0"}),
}


@pytest.mark.parametrize("damage", WHOLE_FILE_DAMAGES.values(), ids=WHOLE_FILE_DAMAGES)
def test_a_file_that_is_damaged_as_a_whole_is_a_warned_miss_and_is_kept_aside(
    damage: Callable[[bytes], bytes], stored: Path, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    broken = damage(stored.read_bytes())
    stored.write_bytes(broken)
    cache = open_warned(open_cache, stored)
    assert head_dims(cache) == set()
    assert stored.read_bytes() == broken
    cache.put(make_record(head_dim=16))
    assert stored.with_name(f"{stored.name}.damaged-1").read_bytes() == broken
    assert head_dims(open_cache()) == {16}


@pytest.mark.parametrize("damage", ENTRY_DAMAGES.values(), ids=ENTRY_DAMAGES)
def test_a_damaged_entry_is_a_warned_miss_and_the_others_still_load(
    damage: Callable[[bytes], bytes], stored: Path, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    broken = damage(stored.read_bytes())
    assert broken != stored.read_bytes()
    stored.write_bytes(broken)
    cache = open_warned(open_cache, stored)
    assert head_dims(cache) == {64, 128}
    assert stored.read_bytes() == broken
    cache.put(make_record(head_dim=16))
    assert stored.with_name(f"{stored.name}.damaged-1").read_bytes() == broken
    assert head_dims(open_cache()) == {16, 64, 128}


@pytest.mark.parametrize("part", range(CUTS))
def test_a_file_cut_short_anywhere_is_a_warned_miss_and_is_kept_aside(
    part: int, stored: Path, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    whole = stored.read_bytes()
    cut = (len(whole.rstrip()) - 1) * part // (CUTS - 1)  # from nothing to all but the last bracket
    stored.write_bytes(whole[:cut])
    cache = open_warned(open_cache, stored)
    assert head_dims(cache) == set()
    cache.put(make_record(head_dim=16))
    assert stored.with_name(f"{stored.name}.damaged-1").read_bytes() == whole[:cut]
    assert head_dims(open_cache()) == {16}


def test_many_damages_of_a_file_make_one_warning_that_counts_them(stored: Path, open_cache: OpenCache) -> None:
    stored.write_bytes(stored.read_bytes().replace(b'"p80_ms": 1.25', b'"p80_ms": 1.35'))
    with pytest.warns(CacheWarning, match=r"entry 1 of 3 .* and 2 more") as caught:
        open_cache()
    assert len(caught) == 1


def test_each_further_damage_is_kept_in_a_copy_of_its_own(
    stored: Path, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    for number in (1, 2, 3):
        stored.write_bytes(b"broken " * number)
        open_warned(open_cache, stored).put(make_record(head_dim=16))
    copies = [stored.with_name(f"{stored.name}.damaged-{number}").read_bytes() for number in (1, 2, 3)]
    assert copies == [b"broken " * number for number in (1, 2, 3)]
    assert head_dims(open_cache()) == {16}


def test_damage_that_comes_after_the_file_was_read_is_kept_aside_too(
    stored: Path, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    cache = open_cache()
    stored.write_bytes(b"broken")
    cache.put(make_record(head_dim=16))
    assert stored.with_name(f"{stored.name}.damaged-1").read_bytes() == b"broken"


def test_a_damaged_file_is_kept_aside_when_an_entry_is_removed(
    stored: Path, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    cache = open_cache()
    damaged = stored.read_text().replace('"trials": 12', '"trials": 13', 1)
    stored.write_text(damaged)
    cache.remove(make_record(head_dim=128))
    assert stored.with_name(f"{stored.name}.damaged-1").read_text() == damaged
    assert head_dims(open_cache()) == {64}


def test_a_whole_file_is_never_copied_aside(stored: Path, make_record: MakeRecord, open_cache: OpenCache) -> None:
    open_cache().put(make_record(head_dim=16))
    assert not list(stored.parent.glob("*.damaged-*"))


def test_a_copy_that_cannot_be_kept_stops_the_put(
    stored: Path, make_record: MakeRecord, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored.write_bytes(b"broken")
    cache = open_warned(open_cache, stored)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copy2", full)
    with pytest.raises(CacheError, match="No space left on device"):
        cache.put(make_record(head_dim=16))
    assert stored.read_bytes() == b"broken"


def test_a_directory_in_the_place_of_the_file_is_a_warned_miss_and_is_moved_aside(
    stored: Path, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    stored.unlink()
    stored.mkdir()
    (stored / "precious").write_text("kept")
    cache = open_warned(open_cache, stored)
    cache.put(make_record(head_dim=16))
    assert (stored.with_name(f"{stored.name}.damaged-1") / "precious").read_text() == "kept"
    assert head_dims(open_cache()) == {16}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_a_warned_miss_and_is_not_written_over(
    stored: Path, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    whole = stored.read_bytes()
    stored.chmod(0)
    cache = open_warned(open_cache, stored)
    with pytest.raises(CacheError, match="cannot be written"):
        cache.put(make_record(head_dim=16))
    stored.chmod(0o600)
    assert stored.read_bytes() == whole


def test_a_file_that_the_disk_cannot_read_is_a_warned_miss(
    stored: Path, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hsa_compile.schedules.store.read_regular", broken)
    with pytest.warns(CacheWarning, match=r"it cannot be read \(Input/output error\)"):
        cache = open_cache()
    assert head_dims(cache) == set()


def test_a_damaged_pretuned_file_is_a_warned_miss(
    make_record: MakeRecord, open_cache: OpenCache, tmp_path: Path
) -> None:
    path = open_cache(user="pretuned").put(make_record())
    path.write_bytes(path.read_bytes()[:100])
    assert head_dims(open_warned(open_cache, path)) == set()


@pytest.mark.parametrize("damage", [b"", b"{", b"broken"], ids=["empty", "cut", "text"])
def test_over_a_damaged_file_the_default_still_runs(
    damage: bytes, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = Target.parse("cpu")
    path = tmp_path / "cache" / "schedules" / f"{target.slug}.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    monkeypatch.setattr("hsa_compile.kernels.resolve._warned", set())
    # In float64, which is never built from C++.
    problem = Problem(seq_len=67, num_heads=4, num_kv_heads=2, head_dim=8, chunk_size=16, top_k=2, dtype="float64")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel = hsa_compile.resolve(problem, target)
        hsa_compile.resolve(problem, target)
    assert [warning.category for warning in caught] == [CacheWarning, UntunedWarning]
    assert str(path) in str(caught[0].message)
    assert kernel.source.schedule == default_schedule(problem, target)

    q = torch.randn(1, 67, 4, 8).double()
    k, v = torch.randn(1, 67, 2, 8).double(), torch.randn(1, 67, 2, 8).double()
    indices = torch.randint(-1, 4, (1, 67, 2, 2), dtype=torch.int32)
    weights = torch.rand(1, 67, 2, 2).double()
    o = kernel.entry(q, k, v, indices, weights, scale=8**-0.5)
    expected = hsa_compile.hsa_attention_reference(q, k, v, indices, weights, chunk_size=16)
    torch.testing.assert_close(o, expected)
    assert path.read_bytes() == damage

    default_cache().put(make_record(problem=problem, target=target))
    assert path.with_name(f"{path.name}.damaged-1").read_bytes() == damage


@pytest.mark.slow
def test_import_over_a_damaged_file_warns_once_and_works(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "schedules" / "some-device.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"{")
    script = "import hsa_compile; print([origin for origin, _ in hsa_compile.default_cache().entries()].count('user'))"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "0"
    assert result.stderr.count("CacheWarning") == 1
    assert str(path) in result.stderr
    assert path.read_bytes() == b"{"


SPECIAL_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a link to a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a directory": Path.mkdir,
    "more than fits in memory": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("make", SPECIAL_FILES.values(), ids=SPECIAL_FILES)
@pytest.mark.parametrize("suffix", ["", ".journal"])
def test_what_is_no_file_is_passed_over_and_moved_out_of_the_way(
    suffix: str, make: Callable[[Path], object], stored: Path, make_record: MakeRecord, open_cache: OpenCache
) -> None:
    place = stored.with_name(stored.name + suffix)
    place.unlink(missing_ok=True)
    make(place)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = open_cache()
    assert all(warning.category is CacheWarning for warning in caught)
    assert head_dims(cache) == ({32, 64, 128} if suffix and not place.is_file() else set())
    cache.put(make_record(head_dim=16))
    assert head_dims(open_cache()) == ({16, 32, 64, 128} if suffix else {16})


def test_of_too_many_bytes_the_longest_files_are_left_out(
    make_record: MakeRecord, cpu: Target, gpu: Target, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for head_dim in (32, 64, 128):
        longest = open_cache().put(make_record(head_dim=head_dim, target=cpu))
    open_cache().put(make_record(head_dim=16, target=gpu))
    monkeypatch.setattr("hsa_compile.schedules.cache.MOST_BYTES", longest.stat().st_size)
    assert head_dims(open_warned(open_cache, longest)) == {16}


def test_a_file_that_is_full_is_not_written(
    stored: Path, make_record: MakeRecord, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored.read_bytes()
    monkeypatch.setattr("hsa_compile.schedules.store.MOST_BYTES", len(before) + 10)
    with pytest.raises(CacheError, match=r"more than \d+: export and clear it"):
        open_cache().put(make_record(head_dim=16))
    assert stored.read_bytes() == before
