"""Samplers by name."""

import importlib.util
import subprocess
import sys

import optuna
import pytest

from hsa_compile.autotune.options import SAMPLERS
from hsa_compile.autotune.samplers import make_sampler
from hsa_compile.errors import InvalidArgument, MissingDependency

POINTS = [{"a": a, "b": b} for a in (1, 2, 3, 4) for b in ("x", "y", "z")]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_proposes(name: str) -> None:
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        pytest.skip("cmaes is not installed")
    study = optuna.create_study(sampler=make_sampler(name, seed=1, space_points=POINTS))
    for _ in range(12):
        trial = study.ask()
        point = {
            "a": trial.suggest_categorical("a", [1, 2, 3, 4]),
            "b": trial.suggest_categorical("b", ["x", "y", "z"]),
        }
        study.tell(trial, 1.0 + point["a"] + (point["b"] != "y"))
    assert study.best_value <= 3.0


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="'best' is not one of ours, tpe"):
        make_sampler("best", seed=0)


@pytest.mark.parametrize("name", ["ours", "grid"])
def test_samplers_of_points_need_them(name: str) -> None:
    with pytest.raises(InvalidArgument, match="needs space_points"):
        make_sampler(name, seed=0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(MissingDependency, match="pip install cmaes"):
        make_sampler("cmaes", seed=0)


@pytest.mark.slow
def test_naming_the_samplers_loads_no_scientific_library() -> None:
    script = "import sys, hsa_compile.autotune.samplers; print({'scipy', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
