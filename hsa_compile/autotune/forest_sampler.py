"""The sampler for kernel spaces: a forest on what was measured, moves around the best, and what is known beforehand."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hsa_compile.autotune.forest import Forecast, forecast
from hsa_compile.autotune.point_sampler import History, PointSampler
from hsa_compile.autotune.point_table import Point, PointTable
from hsa_compile.errors import InvalidArgument

Known = Sequence[float | None] | Callable[[Point], float | None]  # of each point, in their order, or of any

NUM_START = 16  # points before the first forest; one that was enqueued counts
_CANDIDATES = 32  # drawn for a start point, of which the one with the rarest values is taken
_REFIT_EVERY = 4  # finished trials; between, the forest is asked again
_NEIGHBOUR_SHARE = 0.3  # of the moves: the most promising neighbour of one of the best
_NUM_BEST = 3
_SLICE_SHARE = 0.3  # of the moves: the most promising point with another value than the best has, in one parameter
_OPTIMISM = 1.0  # standard deviations between the trees that a point is thought better than their mean
_COST_WEIGHT = 0.05  # of twice the cost, as a share of the spread of what the forest expects


class ForestSampler(PointSampler):
    """Proposes points by a random forest on the ranks of the measured times.

    It starts with points that together have each value about equally often, or, where times are predicted, takes every
    other one from the best predicted. After that each proposal is one of three moves: the point that the forest
    thinks best, optimistically; the best-looking point one parameter away from one of the best measured; the
    best-looking point that differs from the best one in a given parameter, which finds what lies beyond a ridge.
    Failed points count as the slowest did, so that their region is avoided.

    Args:
        points, seed: see `PointSampler`.
        prior: predicted time of each point, None where there is none; only the order counts. Gives the start, and the
            forest one more feature.
        cost: what trying each point costs, for instance seconds to compile; of two that look alike the cheaper is
            tried.
    """

    def __init__(
        self, points: Sequence[Point] | PointTable, *, seed: int, prior: Known | None = None, cost: Known | None = None
    ) -> None:
        super().__init__(points, seed=seed)
        self._features = self.table.features
        self._prior = None if prior is None else _ranks(self._evaluate("prior", prior))
        if self._prior is not None:
            self._features = np.column_stack([self._features, self._prior]).astype(np.float32)
        self._cost = np.zeros(len(self.table)) if cost is None else _log_cost(self._evaluate("cost", cost))
        self._fitted: tuple[History, Forecast] | None = None

    def choose(self, history: History, untaken: NDArray[np.bool_], rng: np.random.Generator) -> int:
        """The next start point or, when there were enough and one has a time, the next move."""
        if len(history.taken) < NUM_START or np.isnan(history.times).all():
            return self._start(history, untaken, rng)
        seen = self._fit(history)
        promise = seen.mean - _OPTIMISM * seen.spread + _COST_WEIGHT * self._cost * seen.mean.std()
        order = np.argsort(np.where(np.isnan(history.times), np.inf, history.times), kind="stable")
        best = [history.finished[i] for i in order[:_NUM_BEST] if not np.isnan(history.times[i])]
        move = rng.random()
        among = untaken
        if move < _NEIGHBOUR_SHARE:
            among = untaken & self._neighbours(best[rng.integers(len(best))])
            promise = promise + _OPTIMISM * seen.spread
        elif move < _NEIGHBOUR_SHARE + _SLICE_SHARE:
            among = untaken & self._slice(best[0], rng)
        return _least(promise, among if among.any() else untaken, rng)

    def _start(self, history: History, untaken: NDArray[np.bool_], rng: np.random.Generator) -> int:
        if self._prior is not None and len(history.taken) % 2 == 0:
            return _least(self._prior, untaken, rng)
        codes = self.table.codes
        drawn = rng.choice(np.flatnonzero(untaken), size=_CANDIDATES)
        taken = codes[list(history.taken)]
        rarity = np.zeros(_CANDIDATES)
        for j, num_values in enumerate(self.table.num_values):
            counts = np.bincount(taken[:, j], minlength=num_values)
            rarity += counts[codes[drawn, j]] * num_values
        return int(drawn[np.argmin(rarity)])

    def _fit(self, history: History) -> Forecast:
        """The forest of the last multiple of `_REFIT_EVERY` finished trials, whoever made them and whenever."""
        count = max(len(history.finished) // _REFIT_EVERY * _REFIT_EVERY, 1)
        while np.isnan(history.times[:count]).all():
            count += 1
        known = History(taken=(), finished=history.finished[:count], times=history.times[:count])
        if self._fitted is None or not _same(self._fitted[0], known):
            seed = int(np.random.default_rng([self.seed, count]).integers(2**31))
            self._fitted = known, forecast(self._features, known.finished, known.times, seed=seed)
        return self._fitted[1]

    def _neighbours(self, index: int) -> NDArray[np.bool_]:
        """Points that differ from one in one parameter."""
        return np.asarray((self.table.codes != self.table.codes[index]).sum(axis=1) == 1)

    def _slice(self, index: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Points with one value, drawn at random, that the given point does not have."""
        if not self.table.num_values:
            return np.zeros(len(self.table), dtype=bool)
        j = int(rng.integers(len(self.table.num_values)))
        value = int(rng.integers(self.table.num_values[j] - 1))
        value += value >= self.table.codes[index, j]
        return np.asarray(self.table.codes[:, j] == value)

    def _evaluate(self, name: str, known: Known) -> NDArray[np.float64]:
        values = [known(point) for point in self.table.points] if callable(known) else list(known)
        if len(values) != len(self.table):
            raise InvalidArgument(
                f"{name} has {len(values)} values; allowed is one for each of {len(self.table)} points"
            )
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _least(values: NDArray[np.float64], among: NDArray[np.bool_], rng: np.random.Generator) -> int:
    """The index of the least value, of several alike any."""
    indices = np.flatnonzero(among)
    chosen = values[indices]
    return int(rng.choice(indices[chosen == chosen.min()]))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places in order of size, equal ones with the same; unknown ones in the middle."""
    known = np.sort(values[~np.isnan(values)])
    places = np.searchsorted(known, values) / max(len(known), 1)
    return np.where(np.isnan(values), 0.5, places)


def _log_cost(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Doublings over the median; unknown ones cost the median."""
    if not (values > 0).any():
        return np.zeros(len(values))
    values = np.where(values > 0, values, np.median(values[values > 0]))
    return np.log2(values / np.median(values))


def _same(history: History, other: History) -> bool:
    return history.finished == other.finished and np.array_equal(history.times, other.times, equal_nan=True)
