"""A Gaussian process over the points of a kernel space: what to expect of each, and how surely."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Priors of the fit, as centre and weight of a squared logarithm: they keep few points from making bold claims.
_RATE, _RATE_WEIGHT = 1.0, 2.0
_NOISE, _NOISE_WEIGHT = 0.02, 0.1
_RATE_RANGE, _NOISE_RANGE = (0.02, 20.0), (1e-4, 0.5)
_JITTER = 1e-6
_LEAST_SCALE = 1e-12  # of values that are all alike
_MAX_ITERATIONS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothness:
    """How fast points grow unlike each other: the correlation of two is exp(-sum of rate * distance).

    A sum of absolute differences, not a Euclidean distance: each knob has an effect of its own, with kinks.

    Attributes:
        rates: [num_features].
        noise: variance of what the features do not explain, as a share.
    """

    rates: Array
    noise: float


def fit_smoothness(features: Array, values: Array) -> Smoothness:
    """The most probable smoothness, by gradient ascent from the priors' centres.

    Args:
        features: [num_measured, num_features], each from 0 to 1.
        values: [num_measured], of mean 0.
    """
    # Here, since it takes long to import and only a search needs it.
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
    """Mean and standard deviation at each point.

    Args:
        features: [num_points, num_features].
        measured: indices of points, without repeats.
        values: of these, of mean 0.
        smoothness: of the process.
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
    """Values that some points may have together: [count, len(among)].

    Args:
        features, measured, values, smoothness: see `predict`.
        among: indices of the points.
        count: how many draws.
        rng: makes them.
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
    """Mean at each point, the variance where nothing is known, and the root of its share that is explained."""
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
    """Minus the log of the posterior density, the scale of the values chosen at its best, and its gradient."""
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
