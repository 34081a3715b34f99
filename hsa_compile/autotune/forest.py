"""A random forest's view of all points, learned from those that were measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_TREES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a forest expects of every point.

    Attributes:
        mean: [num_points], of the trees, of the logarithm of a point's place among the measured ones.
        spread: [num_points], standard deviation between the trees; large where little is known.
    """

    mean: NDArray[np.float64]
    spread: NDArray[np.float64]


def forecast(features: NDArray[np.float32], measured: Sequence[int], times: Sequence[float], *, seed: int) -> Forecast:
    """Grows extremely randomised trees on the measured points and asks them about all.

    Args:
        features: [num_points, num_features].
        measured: indices of points.
        times: of these, at least one finite; NaN for a point that failed.
        seed: of the trees.
    """
    # Here, since it takes a second to import and only a search needs it.
    from sklearn.ensemble import ExtraTreesRegressor

    forest = ExtraTreesRegressor(n_estimators=NUM_TREES, random_state=seed)
    forest.fit(features[list(measured)], _log_places(np.asarray(times)))
    trees = np.stack([tree.tree_.predict(features).ravel() for tree in forest.estimators_])
    return Forecast(mean=trees.mean(axis=0), spread=trees.std(axis=0))


def _log_places(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of the places in order of time, 0 for the slowest and those that failed.

    Places do not feel how slow the slow are, which may be a thousandfold; their logarithm tells the best few apart.
    """
    known = np.sort(times[~np.isnan(times)])
    shares = np.where(np.isnan(times), 1.0, np.searchsorted(known, times) / len(known))
    return np.log(shares + 1 / len(known))
