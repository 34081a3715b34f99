"""The sampler for kernel spaces, and its model: a Gaussian process on measured times and what is known beforehand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray

from hsa_compile.autotune.samplers.point import History, Point, PointSampler, PointTable
from hsa_compile.errors import InvalidArgument

Array = NDArray[np.float64]
Known = Sequence[float | None] | Callable[[Point], float | None]  # a value for each point, in order, or for any point

# The fit has priors, given as centre and weight of a squared logarithm: they keep a few points from bold claims.
_RATE, _RATE_WEIGHT = 1.0, 2.0
_NOISE, _NOISE_WEIGHT = 0.02, 0.1
_RATE_RANGE, _NOISE_RANGE = (0.02, 20.0), (1e-4, 0.5)
_JITTER = 1e-6
_LEAST_SCALE = 1e-12  # the scale of values that are all alike
_MAX_ITERATIONS = 30

NUM_START = 4  # points before the first model, enqueued ones included: with ten, searches of 55 trials ended later
_CANDIDATES = 32  # points drawn for one start point: the one with the rarest values is taken
_FIT_EVERY = 4  # the model's smoothness is fitted anew after so many finished trials
_MAX_LEARNED = 300  # the most points that the model learns from, since the cost grows with the cube
_SLOW = 0.75  # points that are slower than this share of all count as equally slow
_COST_POWER = 0.25  # the power of the cost that divides the expected gain; with 1, the cheapest points would win
_DRAWN_POINTS, _DRAWS = 200, 200  # the gain that is left is the mean of so many draws of the most promising points
_NOBODY = -1  # no trial has this number


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothness:
    """The smoothness of a process: the correlation of two points is exp(-sum of rate * distance).

    The distance is a sum of absolute differences, not Euclidean: each knob has an effect of its own, with kinks.

    Attributes:
        rates: `[num_features]`, how fast points become unlike each other along each feature.
        noise: the share of the variance that the features do not explain.
    """

    rates: Array
    noise: float


def fit_smoothness(features: Array, values: Array) -> Smoothness:
    """Returns the most probable smoothness, by gradient ascent from the priors' centres.

    Args:
        features: `[num_measured, num_features]`, each from 0 to 1.
        values: `[num_measured]`, with mean 0.
    """
    # SciPy is imported here, since that takes long and only a search needs it.
    from scipy.optimize import minimize

    distances = np.abs(features[:, None, :] - features[None, :, :])
    num_features = features.shape[1]
    start = np.log([_RATE] * num_features + [_NOISE])
    bounds = [tuple(np.log(_RATE_RANGE))] * num_features + [tuple(np.log(_NOISE_RANGE))]
    found = minimize(
        _loss,
        start,
        args=(distances, values),
        jac=True,
        bounds=bounds,
        method="L-BFGS-B",
        options={"maxiter": _MAX_ITERATIONS},
    )
    return Smoothness(rates=np.exp(found.x[:-1]), noise=float(np.exp(found.x[-1])))


def predict(features: Array, measured: NDArray[np.int64], values: Array, smoothness: Smoothness) -> tuple[Array, Array]:
    """Returns mean and standard deviation at each point.

    Args:
        features: `[num_points, num_features]`.
        measured: the indices of the measured points, without repeats.
        values: what was measured there, with mean 0.
        smoothness: the smoothness of the process.
    """
    mean, scale, explained = _condition(features, measured, values, smoothness)
    return mean, np.sqrt(scale * np.maximum(1.0 - np.square(explained).sum(axis=0), 1e-9))


def draw(
    features: Array,
    measured: NDArray[np.int64],
    values: Array,
    smoothness: Smoothness,
    *,
    among: NDArray[np.int64],
    count: int,
    rng: np.random.Generator,
) -> Array:
    """Draws values that some points may have together: `[count, len(among)]`.

    Args:
        features, measured, values, smoothness: as in `predict`.
        among: the indices of these points.
        count: how many draws to make.
        rng: what the draws are made with.
    """
    from scipy.linalg import cholesky
    from scipy.spatial.distance import cdist

    kept = np.append(measured, among)
    mean, scale, explained = _condition(features[kept], np.arange(len(measured)), values, smoothness)
    mean, explained = mean[len(measured) :], explained[:, len(measured) :]
    scaled = features[among] * smoothness.rates
    covariance = np.exp(-cdist(scaled, scaled, "cityblock")) - explained.T @ explained
    factor = cholesky(covariance + _JITTER * np.eye(len(among)), lower=True)
    return mean + np.sqrt(scale) * rng.standard_normal((count, len(among))) @ factor.T


def _condition(
    features: Array, measured: NDArray[np.int64], values: Array, smoothness: Smoothness
) -> tuple[Array, float, Array]:
    """Returns the mean at each point, the variance where nothing is known, and the root of its explained share."""
    from scipy.linalg import cho_solve, cholesky, solve_triangular
    from scipy.spatial.distance import cdist

    scaled = features * smoothness.rates
    known = scaled[measured]
    cross = np.exp(-cdist(known, scaled, "cityblock"))  # [num_measured, num_points]
    factor = cholesky(cross[:, measured] + (smoothness.noise + _JITTER) * np.eye(len(known)), lower=True)
    weights = cho_solve((factor, True), values)
    scale = max(float(values @ weights) / len(values), _LEAST_SCALE)
    return weights @ cross, scale, solve_triangular(factor, cross, lower=True)


def _loss(theta: Array, distances: Array, values: Array) -> tuple[float, Array]:
    """Returns minus the log of the posterior density, with the values' scale at its best, and its gradient."""
    from scipy.linalg import cho_solve, cholesky

    n = len(values)
    rates, noise = np.exp(theta[:-1]), float(np.exp(theta[-1]))
    alike = np.exp(-(distances @ rates))
    factor = cholesky(alike + (noise + _JITTER) * np.eye(n), lower=True)
    inverse = cho_solve((factor, True), np.eye(n))
    weights = inverse @ values
    scale = max(float(values @ weights) / n, _LEAST_SCALE)
    far = theta - np.log([_RATE] * len(rates) + [_NOISE])
    strength = np.array([_RATE_WEIGHT] * len(rates) + [_NOISE_WEIGHT])
    loss = 0.5 * n * np.log(scale) + np.log(np.diag(factor)).sum() + (strength * far**2).sum()
    pull = np.outer(weights, weights) / scale - inverse
    by_rate = 0.5 * rates * np.tensordot(pull * alike, distances, axes=2)
    by_noise = -0.5 * noise * np.trace(pull)
    return float(loss), np.append(by_rate, by_noise) + 2 * strength * far


class SurrogateSampler(PointSampler):
    """A sampler that proposes the point with the greatest expected improvement under a Gaussian process.

    It starts with points that together have each value about equally often; where times are predicted, every other one
    is the best predicted. Replayed on recorded sweeps, this model found better points, and sooner, than random forests
    and moves around the best, alone or together with it. Failed points count as the slowest did, so that their region
    is avoided; points that others are trying count as what is expected of them.

    Args:
        points, seed: as in `PointSampler`.
        prior: the predicted time of each point, None where there is none; only the order counts. It decides the start,
            and gives the model one more feature.
        cost: what trying each point costs, for instance seconds to compile; among points that promise alike, the
            cheaper is tried.
    """

    def __init__(
        self, points: Sequence[Point] | PointTable, *, seed: int, prior: Known | None = None, cost: Known | None = None
    ) -> None:
        super().__init__(points, seed=seed)
        self._features = self.table.features
        self._prior = None if prior is None else _places(self._evaluate("prior", prior))
        if self._prior is not None:
            self._features = np.column_stack([self._features, self._prior])
        self._cost = np.zeros(len(self.table)) if cost is None else _log_cost(self._evaluate("cost", cost))
        self._smoothness: tuple[History, Smoothness] | None = None
        self._promise: tuple[History, Array] | None = None

    def choose(self, history: History, untaken: NDArray[np.bool_], rng: np.random.Generator) -> int:
        """Returns a start point until there are enough and one has a time, then the most promising point."""
        if len(history.taken) < NUM_START or np.isnan(history.times).all():
            return self._start(history, untaken, rng)
        return _least(-self._expect(history), untaken, rng)

    def expected_gain(self, study: optuna.Study) -> float:
        """Returns the share of the best time that the best of all unfinished points is expected to save.

        It is much more than the improvement to expect of the next point: all points that are left are drawn together
        from the model. Before there is a model it is 1.
        """
        history = self._read(study, _NOBODY)
        left = np.ones(len(self.table), dtype=bool)
        left[list(history.finished)] = False
        if not left.any():
            return 0.0
        if len(history.finished) < NUM_START or np.isnan(history.times).all():
            return 1.0
        measured, times = _selection(history)
        logs = _logs(times)
        values = _standard(logs)
        smoothness = fit_smoothness(self._features[measured], values)
        mean, spread = predict(self._features, measured, values, smoothness)
        promise = np.where(left, _log_improvement(mean, spread, values.min()), -np.inf)
        best = np.argsort(-promise)[: min(_DRAWN_POINTS, int(left.sum()))]
        rng = np.random.default_rng([self.seed, len(history.finished)])
        drawn = draw(self._features, measured, values, smoothness, among=best, count=_DRAWS, rng=rng)
        gains = np.maximum(values.min() - drawn.min(axis=1), 0.0) * logs.std()
        return float(1.0 - np.exp(-gains).mean())

    def _start(self, history: History, untaken: NDArray[np.bool_], rng: np.random.Generator) -> int:
        if self._prior is not None and len(history.taken) % 2 == 0:
            return _least(self._prior, untaken, rng)
        codes = self.table.codes
        drawn = rng.choice(np.flatnonzero(untaken), size=_CANDIDATES)
        taken = codes[list(history.taken)]
        commonness = np.zeros(_CANDIDATES)
        for j, num_values in enumerate(self.table.num_values):
            counts = np.bincount(taken[:, j], minlength=num_values)
            commonness += counts[codes[drawn, j]] * num_values
        return int(drawn[np.argmin(commonness)])

    def _expect(self, history: History) -> Array:
        """Returns the logarithm of the improvement to expect of each point, less what it costs."""
        pending = set(history.taken) - set(history.finished)
        known = History(taken=tuple(sorted(pending)), finished=history.finished, times=history.times)
        if self._promise is None or not _same(self._promise[0], known):
            measured, values = _learned(known)
            smoothness = self._fit(history)
            mean, spread = predict(self._features, measured, values, smoothness)
            if pending:
                others = np.array(known.taken)
                measured, values = np.append(measured, others), np.append(values, mean[others])
                _, spread = predict(self._features, measured, values, smoothness)
            self._promise = known, _log_improvement(mean, spread, values.min()) - _COST_POWER * self._cost
        return self._promise[1]

    def _fit(self, history: History) -> Smoothness:
        known = _first(history, _FIT_EVERY)
        if self._smoothness is None or not _same(self._smoothness[0], known):
            measured, values = _learned(known)
            self._smoothness = known, fit_smoothness(self._features[measured], values)
        return self._smoothness[1]

    def _evaluate(self, name: str, known: Known) -> Array:
        values = [known(point) for point in self.table.points] if callable(known) else list(known)
        if len(values) != len(self.table):
            raise InvalidArgument(
                f"{name} has {len(values)} values; allowed is one for each of {len(self.table)} points"
            )
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _first(history: History, step: int) -> History:
    """Cuts the finished trials to a multiple of `step`, so that the model does not depend on when it is asked."""
    count = max(len(history.finished) // step * step, 1)
    while np.isnan(history.times[:count]).all():
        count += 1
    return History(taken=(), finished=history.finished[:count], times=history.times[:count])


def _learned(history: History) -> tuple[NDArray[np.int64], Array]:
    """Returns points to learn from, and for each a measure of its time, with mean 0.

    The measure is the sum of two, each with variance 1: the logarithm of the place among the measured, which tells the
    best few apart, and that of the time, which tells how far apart they are. Neither depends on how slow the slow are:
    that may be a thousandfold, and does not help to find the fast.
    """
    points, times = _selection(history)
    ok = np.sort(times[~np.isnan(times)])
    places = np.where(np.isnan(times), 1.0, np.searchsorted(ok, times) / len(ok))
    return points, _standard(np.log(places + 1 / len(ok))) + _standard(_logs(times))


def _selection(history: History) -> tuple[NDArray[np.int64], Array]:
    """Returns finished points with their times, or as many of them as the model can learn from."""
    points, times = np.array(history.finished), np.array(history.times)
    order = np.argsort(np.where(np.isnan(times), np.inf, times), kind="stable")
    if len(order) > _MAX_LEARNED:  # half are the best points, half an even selection of the others
        best, rest = order[: _MAX_LEARNED // 2], order[_MAX_LEARNED // 2 :]
        order = np.append(best, rest[np.linspace(0, len(rest) - 1, _MAX_LEARNED - len(best)).astype(int)])
        order = np.sort(order)
        points, times = points[order], times[order]
    return points, times


def _logs(times: Array) -> Array:
    """Returns logarithms of times; those of slow and failed points are cut to one that is slow enough to be avoided."""
    ok = np.sort(times[~np.isnan(times)])
    slow = ok[min(int(len(ok) * _SLOW), len(ok) - 1)]
    return np.log(np.where(np.isnan(times), slow, np.minimum(times, slow)))


def _log_improvement(mean: Array, spread: Array, best: float) -> Array:
    """Returns the logarithm of the expected improvement on `best`, also where that is too small for a number."""
    from scipy.special import ndtr

    u = (best - mean) / spread
    log_density = -0.5 * u**2 - 0.5 * np.log(2 * np.pi)
    near = np.maximum(u, -5.0)
    direct = np.log(near * ndtr(near) + np.exp(-0.5 * near**2) / np.sqrt(2 * np.pi))
    tail = log_density - 2 * np.log(np.maximum(-u, 1.0))
    return np.log(spread) + np.where(u > -5.0, direct, tail)


def _standard(values: Array) -> Array:
    """Scales values to mean 0 and variance 1, or to 0 throughout if they are all alike."""
    return (values - values.mean()) / (values.std() + 1e-12)


def _least(values: Array, among: NDArray[np.bool_], rng: np.random.Generator) -> int:
    """Returns the index of the least value, and any of several that are alike."""
    indices = np.flatnonzero(among)
    chosen = values[indices]
    return int(rng.choice(indices[chosen == chosen.min()]))


def _places(values: Array) -> Array:
    """Returns places in order of size, from 0 to 1; equal values share a place, unknown ones lie in the middle."""
    known = np.sort(values[~np.isnan(values)])
    places = np.searchsorted(known, values) / max(len(known), 1)
    return np.where(np.isnan(values), 0.5, places)


def _log_cost(values: Array) -> Array:
    """Returns logarithms of the costs over their median; unknown ones cost the median."""
    if not (values > 0).any():
        return np.zeros(len(values))
    values = np.where(values > 0, values, np.median(values[values > 0]))
    return np.log(values / np.median(values))


def _same(history: History, other: History) -> bool:
    return (history.taken, history.finished) == (other.taken, other.finished) and np.array_equal(
        history.times, other.times, equal_nan=True
    )
