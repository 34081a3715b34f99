"""Several views of one study: nobody gets a point that another has, and what a dead process left is taken up."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.trial import TrialState

from hsa_compile.autotune.evaluate import Outcome
from hsa_compile.autotune.study.storage import MAX_RETRIES, close_storage, open_storage
from hsa_compile.autotune.study.study import Proposal, TuningStudy
from hsa_compile.autotune.study.trials import OUTCOME, OWNER, SKIPPED
from hsa_compile.errors import WrongResult
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

PROBLEM = Problem(seq_len=131072, num_heads=4, num_kv_heads=1, head_dim=64, top_k=8)
TIMED = Outcome(stage="full", times_ms=(1.0,), default_times_ms=(2.0,))
DEAD = {"host": "", "pid": 0, "started": "0"}


class Stubborn(optuna.samplers.RandomSampler):
    """Proposes the same point for every trial."""

    def __init__(self, number: int) -> None:
        super().__init__(seed=3)


@pytest.fixture
def storage() -> BaseStorage:
    return InMemoryStorage()


def view(storage: BaseStorage, cpu: Target, **options: Any) -> TuningStudy:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=storage, study_name="study", load_if_exists=True)
    settings: dict[str, Any] = {
        "first": [default_schedule(PROBLEM, cpu)],
        "max_trials": 1000,
        "make_sampler": lambda number: optuna.samplers.RandomSampler(seed=number),
    }
    return TuningStudy(study, storage, PROBLEM, cpu, **{**settings, **options})


def abandon(proposal: Proposal) -> None:
    """Leaves a trial as a process does that is killed."""
    proposal.trial.set_user_attr(OWNER, {**DEAD, "host": platform.node()})


def schedules(proposals: Sequence[Proposal | None]) -> list[Schedule]:
    return [proposal.schedule for proposal in proposals if proposal is not None]


def test_views_never_get_the_same_point_even_from_samplers_that_agree(storage: BaseStorage, cpu: Target) -> None:
    views = [view(storage, cpu, make_sampler=Stubborn) for _ in range(3)]
    given = schedules([one.propose() for _ in range(8) for one in views])
    assert len(given) == len(set(given)) == 24


def test_all_views_together_get_no_more_trials_than_the_study_may_have(storage: BaseStorage, cpu: Target) -> None:
    views = [view(storage, cpu, max_trials=7) for _ in range(2)]
    given = [one.propose() for _ in range(6) for one in views]
    assert sum(proposal is not None for proposal in given) == 7


@pytest.mark.slow
def test_the_whole_space_is_given_out_and_then_nothing(storage: BaseStorage, cpu: Target) -> None:
    one = view(storage, cpu, make_sampler=Stubborn)
    valid = set(SearchSpace.of(PROBLEM, cpu).schedules())
    for _ in valid:
        proposal = one.propose()
        assert proposal is not None
        one.tell(proposal, TIMED)
    assert one.propose() is None
    assert {finished.schedule for finished in one.finished()} == valid


def test_a_trial_of_a_dead_process_is_taken_over_by_number_and_point(storage: BaseStorage, cpu: Target) -> None:
    before, after = view(storage, cpu), view(storage, cpu)
    proposals = [before.propose() for _ in range(3)]
    assert proposals[1] is not None
    abandon(proposals[1])
    adopted = after.propose()
    assert adopted is not None
    assert (adopted.trial.number, adopted.schedule) == (proposals[1].trial.number, proposals[1].schedule)
    assert after.propose() not in proposals


def test_a_trial_that_was_asked_for_and_has_no_point_yet_gets_the_one_it_would_have_had(cpu: Target) -> None:
    whole, killed = view(InMemoryStorage(), cpu), view(InMemoryStorage(), cpu)
    for one in (whole, killed):
        default = one.propose()
        assert default is not None
        one.tell(default, TIMED)
    expected = whole.propose()
    killed.study.enqueue_trial({}, user_attrs={OWNER: {}})
    killed.study.ask()
    adopted = killed.propose()
    assert expected is not None
    assert adopted is not None
    assert (adopted.trial.number, adopted.schedule) == (expected.trial.number, expected.schedule)


def test_an_outcome_that_was_stored_but_not_told_is_told_and_not_repeated(storage: BaseStorage, cpu: Target) -> None:
    before, after = view(storage, cpu), view(storage, cpu)
    proposal = before.propose()
    assert proposal is not None
    proposal.trial.set_user_attr(OUTCOME, TIMED.to_dict())
    abandon(proposal)
    other = after.propose()
    assert other is not None
    assert other.schedule != proposal.schedule
    assert [finished.schedule for finished in after.finished()] == [proposal.schedule]


def test_failures_are_kept_and_their_points_not_tried_again(storage: BaseStorage, cpu: Target) -> None:
    one = view(storage, cpu, make_sampler=Stubborn)
    failed = one.propose()
    assert failed is not None
    one.tell(failed, Outcome.failed("prepare", WrongResult("o is off")))
    assert [(f.schedule, f.outcome.failure) for f in one.finished()] == [(failed.schedule, "WrongResult")]
    assert failed.schedule not in schedules([one.propose() for _ in range(10)])


def test_what_the_ledger_knows_is_neither_tried_nor_counted(storage: BaseStorage, cpu: Target) -> None:
    valid = list(SearchSpace.of(PROBLEM, cpu).schedules())
    known = dict.fromkeys(valid[:20], TIMED)
    one = view(storage, cpu, max_trials=5)
    one.add_known(known)
    one.add_known(known)  # only an empty study takes it
    given = schedules([one.propose() for _ in range(10)])
    assert len(given) == 5
    assert not set(given) & set(known)
    assert len(one.finished()) == 20
    assert not any(finished.counted for finished in one.finished())


def test_in_a_database_a_silent_trial_is_retried_by_optuna_and_given_up_after_a_few(
    cpu: Target, tmp_path: Path
) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    assert isinstance(storage, RDBStorage)

    def all_are_silent() -> None:
        with storage.engine.begin() as connection:
            connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'"))

    try:
        first = view(storage, cpu).propose()
        assert first is not None
        for _ in range(MAX_RETRIES):
            all_are_silent()
            retried = view(storage, cpu).propose()
            assert retried is not None
            assert retried.schedule == first.schedule
            assert retried.trial.number > first.trial.number
        all_are_silent()
        other = view(storage, cpu)
        given = other.propose()
        assert given is not None
        assert given.schedule != first.schedule
        other.tell(given, TIMED)
        states = [trial.state for trial in other.study.trials if SKIPPED not in trial.user_attrs]
        assert states == [TrialState.FAIL] * (MAX_RETRIES + 1) + [TrialState.COMPLETE]
    finally:
        close_storage(storage)
