"""Our sampler: finds, learns from failures, knows nothing but the study, and never asks for the same point twice."""

import itertools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from hsa_compile.autotune.samplers.point import POINT, GridSampler, PointSampler
from hsa_compile.autotune.samplers.surrogate import NUM_START, SurrogateSampler
from hsa_compile.errors import InvalidArgument

# Two dataflows with knobs of their own, as a search asks for them.
TILES, WARPS = (8, 16, 24, 32, 48, 64, 96, 128), (1, 2, 4, 8)
POINTS: list[dict[str, Any]] = [
    {"dataflow": "chunk", "chunk.tile": tile, "chunk.warps": warps, "chunk.sum": how}
    for tile, warps, how in itertools.product(TILES, WARPS, ("atomic", "slots", "both"))
] + [{"dataflow": "token", "token.warps": warps} for warps in WARPS]


def time_of(point: dict[str, Any]) -> float | None:
    """Fastest, 1.0, at tile 64, 4 warps, slots; large tiles with few warps fail."""
    if point["dataflow"] == "token":
        return 4.0 + point["token.warps"]
    tile, warps = point["chunk.tile"], point["chunk.warps"]
    if tile >= 96 and warps <= 2:
        return None
    off = abs(TILES.index(tile) - TILES.index(64)) + 2 * abs(WARPS.index(warps) - 2)
    return (1 + 0.2 * off) * {"atomic": 1.3, "slots": 1.0, "both": 1.6}[point["chunk.sum"]]


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    point: dict[str, Any] = {"dataflow": trial.suggest_categorical("dataflow", ["chunk", "token"])}
    if point["dataflow"] == "token":
        return {**point, "token.warps": trial.suggest_categorical("token.warps", WARPS)}
    return {
        **point,
        "chunk.tile": trial.suggest_categorical("chunk.tile", TILES),
        "chunk.warps": trial.suggest_categorical("chunk.warps", WARPS),
        "chunk.sum": trial.suggest_categorical("chunk.sum", ["atomic", "slots", "both"]),
    }


def tell(study: optuna.Study, trial: optuna.Trial, time: float | None) -> None:
    study.tell(trial, time, state=TrialState.FAIL if time is None else TrialState.COMPLETE)


def search(study: optuna.Study, count: int, time: Callable[[dict[str, Any]], float | None] = time_of) -> list[dict]:
    points = []
    for _ in range(count):
        trial = study.ask()
        points.append(suggest(trial))
        tell(study, trial, time(points[-1]))
    return points


def new_study(seed: int = 0, storage: optuna.storages.BaseStorage | None = None, **known: Any) -> optuna.Study:
    sampler = SurrogateSampler(POINTS, seed=seed, **known)
    return optuna.create_study(study_name="s", storage=storage, sampler=sampler, load_if_exists=True)


def journal(path: Path) -> optuna.storages.JournalStorage:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))


def number_until_found(study: optuna.Study) -> int:
    return next(count for count in itertools.count(1) if time_of(search(study, 1)[0]) == 1.0)


def test_the_best_of_a_hundred_points_is_found_in_a_third_of_them() -> None:
    counts = sorted(number_until_found(new_study(seed)) for seed in range(5))
    assert counts[2] <= 25
    assert counts[-1] <= 35


def test_no_point_is_proposed_twice_until_all_were() -> None:
    study = new_study()
    points = search(study, len(POINTS))
    assert sorted(map(str, points)) == sorted(map(str, POINTS))
    assert search(study, 1)[0] in POINTS


def test_equal_seeds_propose_alike_and_others_do_not() -> None:
    first, again, other = (search(new_study(seed), 24) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("killed_after", [3, 5, 15, 22])
def test_another_process_goes_on_as_the_first_would_have(tmp_path: Path, killed_after: int) -> None:
    whole = search(new_study(), 26)
    before = search(new_study(storage=journal(tmp_path / "study")), killed_after)
    after = search(new_study(storage=journal(tmp_path / "study")), 26 - killed_after)
    assert before + after == whole


def test_a_trial_that_is_taken_over_keeps_its_point(tmp_path: Path) -> None:
    whole = search(new_study(), 20)
    study = new_study(storage=journal(tmp_path / "study"))
    search(study, 13)
    study.ask()  # and the process dies before the first parameter is asked for
    study = new_study(storage=journal(tmp_path / "study"))
    left = study.get_trials()[-1]
    trial = optuna.Trial(study, left._trial_id)
    point = suggest(trial)
    assert point == left.system_attrs[POINT] == whole[13]
    tell(study, trial, time_of(point))
    assert search(study, 6) == whole[14:]


def test_points_that_others_are_trying_are_taken_and_believed() -> None:
    study = new_study()
    search(study, 16)
    trials = [study.ask() for _ in range(8)]
    points = [suggest(trial) for trial in trials]
    assert len(set(map(str, points))) == 8
    # The workers spread: not all of them go for neighbours of one point.
    assert len({point.get("chunk.sum") for point in points}) > 1


def test_workers_that_ask_at_the_same_time_get_different_points(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    start = threading.Barrier(4)

    def work() -> None:
        study = new_study(storage=journal(tmp_path / "study"))
        for _ in range(4):
            start.wait()
            trial = study.ask()
            asked.append(suggest(trial))

    new_study(storage=journal(tmp_path / "study"))
    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(asked) == 16
    assert len(set(map(str, asked))) == 16


def test_enqueued_points_are_tried_first_and_count_as_start() -> None:
    study = new_study()
    study.enqueue_trial(POINTS[7])
    study.enqueue_trial({})  # as a trial that carries attributes of its own is made
    points = search(study, 12)
    assert points[0] == POINTS[7]
    assert points.count(POINTS[7]) == 1


def test_a_region_that_fails_is_avoided() -> None:
    def fails_but_for_slots(point: dict[str, Any]) -> float | None:
        return time_of(point) if point.get("chunk.sum") in (None, "slots") else None

    proposed = [point for seed in range(5) for point in search(new_study(seed), 20, fails_but_for_slots)[NUM_START:]]
    failed = [fails_but_for_slots(point) for point in proposed].count(None)
    assert failed <= len(proposed) / 3  # of all points two thirds fail


def test_a_search_goes_on_while_everything_fails() -> None:
    points = search(new_study(), 20, lambda point: None)
    assert len(set(map(str, points))) == 20


def test_times_that_are_all_alike_do_no_harm() -> None:
    assert len(set(map(str, search(new_study(), 20, lambda point: 1.0)))) == 20


def test_pruned_trials_count_with_the_time_they_had() -> None:
    study = new_study()
    trial = study.ask()
    point = suggest(trial)
    trial.report(2.5, step=0)
    study.tell(trial, state=TrialState.PRUNED)
    sampler = study.sampler
    assert isinstance(sampler, SurrogateSampler)
    history = sampler._read(study, own_number=1)
    assert history.times == (2.5,)
    assert history.finished == (sampler.table.find(point),)


def test_a_prior_leads_the_start() -> None:
    def prior(point: dict[str, Any]) -> float | None:
        return None if point["dataflow"] == "token" else time_of(point) or 9.0

    with_prior = [number_until_found(new_study(seed, prior=prior)) for seed in range(3)]
    assert max(with_prior) <= 2
    as_list = new_study(prior=[prior(point) for point in POINTS])
    assert search(as_list, 14) == search(new_study(prior=prior), 14)


def test_a_wrong_prior_is_overcome() -> None:
    counts = [number_until_found(new_study(seed, prior=lambda point: 1 / (time_of(point) or 9.0))) for seed in range(3)]
    assert max(counts) <= 50


def test_of_points_that_promise_alike_the_cheaper_are_tried() -> None:
    def cost(point: dict[str, Any]) -> float:
        return 100.0 if point.get("chunk.warps") in (1, 8) else 1.0

    def time(point: dict[str, Any]) -> float:  # the dear knob does not matter
        return 1.0 + TILES.index(point["chunk.tile"]) if point["dataflow"] == "chunk" else 9.0

    dear, plain = (
        sum(cost(point) > 1 for seed in range(3) for point in search(study(seed), 30, time)[NUM_START:])
        for study in (lambda seed: new_study(seed, cost=cost), new_study)
    )
    assert dear < 0.7 * plain


def gain_of(study: optuna.Study) -> float:
    assert isinstance(study.sampler, SurrogateSampler)
    return study.sampler.expected_gain(study)


def test_all_may_be_gained_before_there_is_a_model_and_nothing_when_no_point_is_left() -> None:
    study = new_study()
    assert gain_of(study) == 1.0
    search(study, NUM_START - 1)
    assert gain_of(study) == 1.0
    search(study, len(POINTS) - NUM_START)
    assert 0.0 <= gain_of(study) < 0.02
    search(study, 1)
    assert gain_of(study) == 0.0


def test_points_that_are_being_tried_may_still_gain() -> None:
    study = new_study()
    search(study, NUM_START)
    trials = [study.ask() for _ in range(len(POINTS) - NUM_START)]
    points = [suggest(trial) for trial in trials]
    assert gain_of(study) > 0.02
    for trial, point in zip(trials, points, strict=True):
        tell(study, trial, time_of(point))
    assert gain_of(study) == 0.0


def test_little_is_left_to_gain_once_the_best_is_found_and_much_before() -> None:
    before, after = [], []
    for seed in range(5):
        study = new_study(seed)
        search(study, NUM_START)
        before.append(gain_of(study))
        search(study, 20)
        assert study.best_value == 1.0
        after.append(gain_of(study))
    assert min(before) > 0.1
    assert max(after) < 0.02


def test_a_prior_of_another_length_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="prior has 2 values; allowed is one for each of 100"):
        SurrogateSampler(POINTS, seed=0, prior=[1.0, 2.0])


def test_a_study_that_maximises_is_refused() -> None:
    study = optuna.create_study(direction="maximize", sampler=SurrogateSampler(POINTS, seed=0))
    with pytest.raises(InvalidArgument, match="MINIMIZE"):
        study.ask()


def test_a_parameter_that_the_point_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="'nonsense' is not in the trial's point"):
        new_study().ask().suggest_categorical("nonsense", [1, 2])


def test_more_points_than_the_model_learns_from_are_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsa_compile.autotune.samplers.surrogate._MAX_LEARNED", 20)
    assert len(set(map(str, search(new_study(), 40)))) == 40


@pytest.mark.parametrize("make", [SurrogateSampler, GridSampler])
def test_a_sampler_travels_to_another_process(make: type[PointSampler]) -> None:
    sampler = make(POINTS, seed=1)
    studies = [optuna.create_study(sampler=one) for one in (sampler, pickle.loads(pickle.dumps(sampler)))]
    assert search(studies[0], 12) == search(studies[1], 12)


def test_the_grid_has_every_point_once_in_an_order_of_the_seed() -> None:
    orders = [search(optuna.create_study(sampler=GridSampler(POINTS, seed=seed)), len(POINTS)) for seed in (0, 0, 1)]
    assert sorted(map(str, orders[0])) == sorted(map(str, POINTS))
    assert orders[0] == orders[1] != orders[2]
