import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hsa_compile.errors import CacheError, InvalidArgument
from hsa_compile.schedules.cache import Merged, ScheduleCache
from hsa_compile.schedules.exchange import VERSION, export_records, import_records
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.store import checksum
from hsa_compile.target import Target

MakeRecord = Callable[..., TuningRecord]
OpenCache = Callable[..., ScheduleCache]


def signed(path: Path, **changes: Any) -> None:
    """Changes fields of an exported file and makes its checksum fit again."""
    body = {**json.loads(path.read_text()), **changes}
    del body["checksum"]
    path.write_text(json.dumps({**body, "checksum": checksum(body)}))


@pytest.fixture
def exported(tmp_path: Path, make_record: MakeRecord) -> Path:
    path = tmp_path / "schedules.json"
    export_records(path, [make_record(), make_record(head_dim=128)])
    return path


def test_what_was_exported_comes_back(exported: Path, make_record: MakeRecord) -> None:
    found = import_records(exported)
    assert found.records == (make_record(), make_record(head_dim=128))
    assert found.foreign == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": VERSION + 1}, f"format version {VERSION + 1}; this one reads {VERSION}"),
        ({"hsa-compile": "99.0"}, "comes from hsa-compile '99.0', this is "),
        ({"format": "somebody's settings"}, "is not a file that `hsa-compile schedules export` wrote"),
        ({"entries": 3}, "has no list of entries"),
        ({"entries": [{"key": {}}]}, "holds an entry that this hsa-compile cannot read"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_foreign_file_is_refused_with_a_clear_word(changes: dict[str, Any], message: str, exported: Path) -> None:
    signed(exported, **changes)
    with pytest.raises(InvalidArgument, match=message):
        import_records(exported)


def test_a_damaged_file_is_refused(exported: Path) -> None:
    text = exported.read_text()
    exported.write_text(text.replace('"trials": 12', '"trials": 13', 1))
    with pytest.raises(InvalidArgument, match="its checksum does not fit"):
        import_records(exported)
    content = json.loads(text)
    exported.write_text(json.dumps({**content, "entries": content["entries"][:1]}))
    with pytest.raises(InvalidArgument, match="its checksum does not fit"):
        import_records(exported)
    exported.write_text(text[: len(text) // 2])
    with pytest.raises(InvalidArgument, match="is damaged or no JSON"):
        import_records(exported)
    exported.unlink()
    with pytest.raises(InvalidArgument, match="cannot be read: No such file"):
        import_records(exported)


def test_entries_for_kernels_of_another_text_are_left_out_and_counted(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "schedules.json"
    export_records(path, [make_record(), make_record(head_dim=128, kernel_source="0123456789ab")])
    found = import_records(path)
    assert (found.records, found.foreign) == ((make_record(),), 1)


def test_a_directory_that_is_not_there_is_a_cache_error(tmp_path: Path, make_record: MakeRecord) -> None:
    with pytest.raises(CacheError, match=r"cannot write .*No such file"):
        export_records(tmp_path / "none" / "schedules.json", [make_record()])


def test_a_link_stays_and_the_file_that_it_names_is_written(tmp_path: Path, make_record: MakeRecord) -> None:
    link, file = tmp_path / "link.json", tmp_path / "elsewhere.json"
    link.symlink_to(file)
    for _ in range(2):  # at first it leads nowhere
        export_records(link, [make_record()])
        assert link.is_symlink()
        assert import_records(file).records == (make_record(),)


def test_what_is_no_regular_file_is_not_written_over(tmp_path: Path, make_record: MakeRecord) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, why in ((pipe, "it is no regular file"), (tmp_path, "Is a directory")):
        with pytest.raises(CacheError, match=rf"cannot write .*: {why}"):
            export_records(path, [make_record()])
    assert pipe.is_fifo()


EARLIER, LATER = "2026-01-01T00:00:00+00:00", "2026-03-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (None, {}, Merged(added=1)),
        ({}, {"date": LATER}, Merged(replaced=1)),
        ({}, {"date": EARLIER}, Merged(kept=1)),
        ({}, {}, Merged(kept=1)),
        ({"date": EARLIER}, {"date": LATER, "kind": "predicted"}, Merged(kept=1)),
        ({"date": LATER, "kind": "predicted"}, {"date": EARLIER}, Merged(replaced=1)),
    ],
    ids=["none", "later", "earlier", "same", "prediction over measurement", "measurement over prediction"],
)
def test_a_merge_keeps_the_better_entry_and_counts(
    mine: dict[str, Any] | None,
    theirs: dict[str, Any],
    expected: Merged,
    make_record: MakeRecord,
    open_cache: OpenCache,
    cpu: Target,
) -> None:
    cache = open_cache()
    if mine is not None:
        cache.put(make_record(median_ms=1.0, **mine))
    incoming = make_record(median_ms=2.0, **theirs)
    assert cache.merge([incoming]) == expected
    winner = 1.0 if expected.kept else 2.0
    for reader in (cache, open_cache()):
        found = reader.lookup(incoming.problem, cpu)
        assert found is not None
        assert found.record.measurement.median_ms == winner


def test_a_merge_sorts_records_into_the_files_of_their_devices(
    make_record: MakeRecord, open_cache: OpenCache, gpu: Target
) -> None:
    cache = open_cache()
    merged = cache.merge([make_record(), make_record(head_dim=128), make_record(target=gpu)])
    assert merged == Merged(added=3)
    assert len(list(cache.directory.glob("*.json"))) == 2
    assert len(list(open_cache().entries())) == 3
