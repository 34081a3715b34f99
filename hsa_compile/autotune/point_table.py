"""All points of a search, as numbers that a model can learn from."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsa_compile.errors import InvalidArgument

Point = Mapping[str, Any]


class PointTable:
    """A finite list of points, each a mapping of parameter → value; a point need not have every parameter.

    Args:
        points: at least one; no two alike.

    Attributes:
        points: as given.
        codes: [num_points, num_parameters], which value of a parameter a point has, counted in order of size; a
            missing parameter is a value, too. Parameters with one value are left out.
        features: [num_points, num_features], each from 0 to 1, for a model to learn from: the codes of numbers, a
            column for each value of anything else, and how often an integer can be halved, since kernels take more
            kindly to 96 than to 97.

    Raises:
        InvalidArgument: there is no point, or one is there twice.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = [dict(point) for point in points]
        self._index = {point_key(point): index for index, point in enumerate(self.points)}
        if not self.points or len(self._index) < len(self.points):
            repeated = len(self.points) - len(self._index)
            raise InvalidArgument(f"{len(self.points)} points of which {repeated} repeat; allowed: 1 or more, all new")
        names = dict.fromkeys(name for point in self.points for name in point)
        columns = [[point.get(name) for point in self.points] for name in names]
        columns = [column for column in columns if len(set(map(_typed, column))) > 1]
        ordered = [_ordered(column) for column in columns]
        self.codes: NDArray[np.int64] = np.zeros((len(self.points), len(columns)), dtype=np.int64)
        for j, (column, values) in enumerate(zip(columns, ordered, strict=True)):
            rank = {_typed(value): code for code, value in enumerate(values)}
            self.codes[:, j] = [rank[_typed(value)] for value in column]
        self.num_values: list[int] = [len(values) for values in ordered]
        self.features: NDArray[np.float64] = self._make_features(columns, ordered)

    def __len__(self) -> int:
        return len(self.points)

    def find(self, point: Point) -> int | None:
        """The index of a point, or None if it is not one of them."""
        return self._index.get(point_key(point))

    def _make_features(self, columns: Sequence[Sequence[Any]], ordered: Sequence[Sequence[Any]]) -> NDArray[np.float64]:
        features: list[NDArray[Any]] = []
        for column, codes, values in zip(columns, self.codes.T, ordered, strict=True):
            if len(values) == 2 or all(value is None or _is_number(value) for value in values):
                features.append(codes)
            else:
                features += [codes == code for code in range(len(values))]
            if all(value is None or isinstance(value, int) for value in values):
                twos = _powers_of_two(np.array([value or 0 for value in column], dtype=np.int64))
                features += [] if twos is None else [twos]
        if not features:
            return np.zeros((len(self.points), 1))
        stacked = np.stack(features, axis=1).astype(np.float64)
        return stacked / stacked.max(axis=0)


def point_key(point: Point) -> Hashable:
    """What makes two points the same, whatever the order of their parameters."""
    return tuple(sorted((name, *_typed(value)) for name, value in point.items()))


def _typed(value: Any) -> tuple[str, str]:
    """A value that can be compared with any other, and with 1 and True apart."""
    return type(value).__name__, repr(value)


def _ordered(column: Sequence[Any]) -> list[Any]:
    """The values that occur: a missing one, then numbers by size, then the rest by name."""
    values = list({_typed(value): value for value in column}.values())
    numbers = sorted(value for value in values if _is_number(value))
    rest = sorted((value for value in values if value is not None and not _is_number(value)), key=_typed)
    return [*(value for value in values if value is None), *numbers, *rest]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _powers_of_two(counts: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """How often each value can be halved; None where that says no more than the size does, or always the same."""
    if (counts < 0).any():
        return None
    positive = np.maximum(counts, 1)
    lowest_bit = positive & -positive
    if (lowest_bit == positive).all() or (lowest_bit == lowest_bit[0]).all():
        return None
    return np.log2(lowest_bit).astype(np.int64)
