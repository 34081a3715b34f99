import json
from pathlib import Path

import pytest

from hsa_compile.errors import InvalidArgument
from hsa_compile.paths import REGRET_FILE
from hsa_compile.schedules import lookup as regret
from hsa_compile.schedules.lookup import RegretBin, expected_regret, regret_table


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "regret.json"
    bins = [
        {"up_to": up_to, "pairs": 4, "mean": mean, "p90": mean, "default_mean": 0.5}
        for up_to, mean in ((1.0, 0.01), (3.0, 0.05))
    ]
    path.write_text(json.dumps({"cpu": {"device": "Some CPU", "shapes": 5, "bins": bins}}))
    monkeypatch.setattr(regret, "REGRET_FILE", path)
    regret_table.cache_clear()
    yield
    regret_table.cache_clear()


@pytest.mark.usefixtures("table")
def test_the_expected_loss_is_that_of_the_distances_bin() -> None:
    assert [expected_regret("cpu", distance) for distance in (0, 0.5, 1.0, 1.5, 3.0)] == [0.0, 0.01, 0.01, 0.05, 0.05]


@pytest.mark.usefixtures("table")
def test_beyond_the_table_and_without_one_nothing_is_known() -> None:
    assert expected_regret("cpu", 3.01) is None
    assert expected_regret("cuda", 0.5) is None
    assert expected_regret("cuda", 0) == 0.0


def test_without_a_file_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regret, "REGRET_FILE", tmp_path / "none.json")
    regret_table.cache_clear()
    assert expected_regret("cpu", 1.0) is None
    regret_table.cache_clear()


def test_a_figure_that_is_no_number_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="mean = nan"):
        RegretBin(up_to=1.0, pairs=2, mean=float("nan"), p90=0.0, default_mean=0.0)


def test_the_table_that_ships_is_whole() -> None:
    regret_table.cache_clear()
    for kind, content in json.loads(REGRET_FILE.read_text()).items():
        found = regret_table(kind)
        assert found is not None
        assert [entry.up_to for entry in found.bins] == sorted({entry.up_to for entry in found.bins})
        assert all(entry.pairs > 0 for entry in found.bins)
        assert content["command"]
