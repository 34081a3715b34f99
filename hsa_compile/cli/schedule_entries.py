"""Entries of the schedule cache by the numbers that `hsa-compile schedules list` shows."""

from typing import Any

from hsa_compile.errors import InvalidArgument
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.record import TuningRecord


def entry_number(number: int) -> tuple[str, TuningRecord]:
    """Origin and record of an entry of the list.

    Raises:
        InvalidArgument: there is none of that number.
    """
    entries = list(default_cache().entries())
    if not 1 <= number <= len(entries):
        raise InvalidArgument(f"entry {number} does not exist; there are {len(entries)}")
    return entries[number - 1]


def entry_values(number: int, origin: str, record: TuningRecord) -> dict[str, Any]:
    """Everything about an entry, ready for JSON."""
    return {"number": number, "origin": origin, "speedup": record.speedup, **record.to_dict()}
