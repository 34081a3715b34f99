"""What a schedule of another shape costs: measured shape against shape, read by the distance of their keys."""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hsa_compile.errors import InvalidArgument
from hsa_compile.paths import REGRET_FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class RegretBin:
    """Pairs of shapes at distances up to a bound, beyond that of the bin before.

    Attributes:
        up_to: largest distance of the keys.
        pairs: how many there were.
        mean, p90: share of time lost by taking the other shape's winner instead of one's own; 0.03 is 3 %.
        default_mean: lost by the default schedule instead, on the same shapes.
    """

    up_to: float
    pairs: int
    mean: float
    p90: float
    default_mean: float

    def __post_init__(self) -> None:
        for spec in fields(self):
            if not math.isfinite(getattr(self, spec.name)):
                raise InvalidArgument(f"{spec.name} = {getattr(self, spec.name)!r} must be a finite number")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegretTable:
    """Regret by distance, on one device; taken for all of its kind.

    Attributes:
        device: where it was measured.
        shapes: how many problems were tuned.
        bins: by growing distance.
    """

    device: str
    shapes: int
    bins: tuple[RegretBin, ...]

    @property
    def reach(self) -> float:
        """The largest distance about which anything is known."""
        return self.bins[-1].up_to

    def at(self, distance: float) -> RegretBin | None:
        """The bin of a distance; None beyond the last."""
        return next((entry for entry in self.bins if distance <= entry.up_to), None)


@functools.cache
def regret_table(kind: str) -> RegretTable | None:
    """The table for a kind of device (`cpu`, `cuda`, `hip`), or None if none was measured."""
    if not REGRET_FILE.exists():
        return None
    tables: Mapping[str, Any] = json.loads(REGRET_FILE.read_text(encoding="utf-8"))
    if kind not in tables:
        return None
    table = tables[kind]
    bins = tuple(RegretBin(**entry) for entry in table["bins"])
    return RegretTable(device=table["device"], shapes=table["shapes"], bins=bins)


def expected_regret(kind: str, distance: float) -> float | None:
    """Share of time that a schedule from a key so far away is expected to lose; None where nobody measured it."""
    if distance == 0:
        return 0.0
    table = regret_table(kind)
    found = table.at(distance) if table else None
    return found.mean if found else None
