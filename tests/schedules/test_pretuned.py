"""The schedules that ship with the package."""

from pathlib import Path

import pytest

from hsa_compile.paths import PRETUNED_DIR
from hsa_compile.schedules.cache import ScheduleCache
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.schedules.store import read_records

FILES = sorted(PRETUNED_DIR.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_is_whole_valid_and_served_on_its_device(path: Path, tmp_path: Path) -> None:
    records, damages = read_records(path)
    assert not damages
    cache = ScheduleCache(tmp_path, pretuned=PRETUNED_DIR)
    for record in records.values():
        assert path.stem == record.target.slug
        assert SearchSpace.of(record.problem, record.target).is_valid(record.schedule)
        # After a change of the templates an entry serves no more: time it again with `make gpu`, or remove it.
        found = cache.lookup(record.problem, record.target)
        assert found is not None
        assert (found.origin, found.distance) == ("pretuned", 0)
        assert found.record == record
