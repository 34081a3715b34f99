"""Makes a sampler by its name: ours, which is for kernel spaces, a grid, or one of Optuna's."""

import importlib.util
from collections.abc import Sequence

import optuna

from hsa_compile.autotune.options import SAMPLERS
from hsa_compile.autotune.samplers.point import GridSampler, Point, PointTable
from hsa_compile.autotune.samplers.surrogate import Known, SurrogateSampler
from hsa_compile.errors import InvalidArgument, MissingDependency

STATELESS = ("ours", "grid")  # these samplers serve all trials with one object, and propose the same in any process

_TPE_STARTUP_TRIALS = 8
_NEEDS = {"gp": ("torch", "scipy"), "cmaes": ("cmaes",), "ours": ("scipy",)}


def make_sampler(
    name: str,
    *,
    seed: int,
    space_points: Sequence[Point] | PointTable | None = None,
    prior: Known | None = None,
    cost: Known | None = None,
) -> optuna.samplers.BaseSampler:
    """Makes a sampler for a study that minimises.

    Args:
        name: one of `SAMPLERS`. `ours` and `grid` try valid points only; `cmaes` leaves categorical parameters to
            chance, and all knobs are such.
        seed: equal seeds make equal proposals from equal trials.
        space_points: every valid point as Optuna's parameters, or their table; only `ours` and `grid` use them, and
            need them.
        prior: the predicted time of each point, in the same order, or a function of the point; for `ours`.
        cost: what it costs to try each point, in the same form; for `ours`.

    Raises:
        InvalidArgument: there is no such sampler, or it needs the points.
        MissingDependency: the sampler needs a package that is not installed.
    """
    if name not in SAMPLERS:
        raise InvalidArgument(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")
    missing = [package for package in _NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependency(f"sampler {name} needs more packages: pip install {' '.join(missing)}")
    if name in STATELESS:
        if space_points is None:
            raise InvalidArgument(f"sampler {name} needs space_points: every valid point")
        if name == "grid":
            return GridSampler(space_points, seed=seed)
        return SurrogateSampler(space_points, seed=seed, prior=prior, cost=cost)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_TPE_STARTUP_TRIALS)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if name == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return optuna.samplers.RandomSampler(seed=seed)
