"""The Gaussian process: its gradient is that of its loss, it finds what matters, and doubts what it has not seen."""

import numpy as np
import pytest

from hsa_compile.autotune.samplers import surrogate as gaussian_process
from hsa_compile.autotune.samplers.surrogate import Smoothness, draw, fit_smoothness, predict


@pytest.fixture
def sample() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = rng.random((40, 3))
    values = np.sin(4 * features[:, 0]) + 0.3 * features[:, 1]
    return features, values - values.mean()


def test_the_gradient_is_that_of_the_loss(sample: tuple[np.ndarray, np.ndarray]) -> None:
    features, values = sample
    distances = np.abs(features[:, None] - features[None])
    theta = np.array([0.3, -0.5, 0.1, -3.0])

    def loss(at: np.ndarray) -> float:
        return gaussian_process._loss(at, distances, values)[0]

    _, gradient = gaussian_process._loss(theta, distances, values)
    step = 1e-5 * np.eye(4)
    by_differences = [(loss(theta + s) - loss(theta - s)) / 2e-5 for s in step]
    np.testing.assert_allclose(gradient, by_differences, rtol=1e-4)


def test_a_feature_that_matters_gets_the_higher_rate(sample: tuple[np.ndarray, np.ndarray]) -> None:
    rates = fit_smoothness(*sample).rates
    assert rates[0] > 1.5 * rates[2]


def test_measured_points_are_known_and_others_doubted(sample: tuple[np.ndarray, np.ndarray]) -> None:
    features, values = sample
    known, smoothness = np.arange(30), Smoothness(rates=np.full(3, 2.0), noise=1e-4)
    values = values - values[known].mean()
    mean, spread = predict(features, known, values[known], smoothness)
    np.testing.assert_allclose(mean[known], values[known], atol=0.02)
    assert spread[known].max() < 0.3 * spread[30:].min()
    assert np.corrcoef(mean[30:], values[30:])[0, 1] > 0.8


def test_draws_scatter_as_the_prediction_says_and_near_points_together(sample: tuple[np.ndarray, np.ndarray]) -> None:
    features, values = sample
    features = np.vstack([features, features[35] + 1e-4])
    known, smoothness = np.arange(30), Smoothness(rates=np.full(3, 2.0), noise=1e-2)
    values = values[known] - values[known].mean()
    mean, spread = predict(features, known, values, smoothness)
    among = np.array([31, 35, 40, 3])
    drawn = draw(features, known, values, smoothness, among=among, count=4000, rng=np.random.default_rng(0))
    assert drawn.shape == (4000, 4)
    np.testing.assert_allclose(drawn.mean(axis=0), mean[among], atol=0.03)
    np.testing.assert_allclose(drawn.std(axis=0), spread[among], rtol=0.1)
    assert np.corrcoef(drawn[:, 1], drawn[:, 2])[0, 1] > 0.99


def test_values_that_are_all_alike_do_no_harm() -> None:
    features = np.linspace(0, 1, 5)[:, None]
    smoothness = fit_smoothness(features[:3], np.zeros(3))
    mean, spread = predict(features, np.arange(3), np.zeros(3), smoothness)
    assert (mean == 0).all()
    assert (spread > 0).all()
    assert np.isfinite(spread).all()
