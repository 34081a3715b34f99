"""Points as numbers: found again whatever their order, and described so that a model can learn from them."""

import numpy as np
import pytest

from hsa_compile.autotune.samplers.point import PointTable
from hsa_compile.errors import InvalidArgument


def test_a_point_is_found_whatever_the_order_of_its_parameters() -> None:
    table = PointTable([{"a": 1, "b": "x"}, {"a": 2, "b": "x"}])
    assert table.find({"b": "x", "a": 2}) == 1
    assert table.find({"a": 3, "b": "x"}) is None
    assert table.find({"a": 1}) is None


def test_one_and_true_are_not_the_same() -> None:
    table = PointTable([{"a": 1}, {"a": True}])
    assert (table.find({"a": 1}), table.find({"a": True})) == (0, 1)


def test_numbers_are_coded_by_size_and_a_missing_one_comes_first() -> None:
    table = PointTable([{"flow": "x", "x.n": 128}, {"flow": "x", "x.n": 16}, {"flow": "y"}])
    assert table.codes[:, 1].tolist() == [2, 1, 0]
    assert table.num_values == [2, 3]


def test_parameters_with_one_value_are_left_out() -> None:
    assert PointTable([{"a": 1, "b": 7}, {"a": 2, "b": 7}]).codes.shape == (2, 1)


def test_words_get_a_column_each_and_features_stay_within_0_and_1() -> None:
    table = PointTable([{"word": word, "n": n} for word in ("p", "q", "r") for n in (32, 48, 64, 128)])
    assert table.features.shape == (12, 3 + 1 + 1)  # the words, the number, and how often it can be halved
    assert (table.features >= 0).all()
    assert (table.features.max(axis=0) == 1).all()


def test_powers_of_two_have_no_second_column() -> None:
    assert PointTable([{"n": n} for n in (1, 2, 4, 8)]).features.shape == (4, 1)


def test_a_single_point_is_a_table() -> None:
    table = PointTable([{"a": 1}])
    assert np.array_equal(table.features, [[0.0]])


@pytest.mark.parametrize("points", [[], [{"a": 1, "b": 2}, {"b": 2, "a": 1}]], ids=["none", "a repeat"])
def test_a_table_without_points_or_with_repeats_is_refused(points: list[dict[str, int]]) -> None:
    with pytest.raises(InvalidArgument, match="allowed: 1 or more, all new"):
        PointTable(points)
