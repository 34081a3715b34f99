"""The study of one problem: what all workers tried, and what to try next. Optuna keeps it; workers ask and tell."""

import contextlib
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from hsa_compile.autotune.evaluate import Outcome
from hsa_compile.autotune.samplers.point import distributions_of, parameters_of, schedule_of, suggest
from hsa_compile.autotune.samplers.surrogate import SurrogateSampler
from hsa_compile.autotune.study.storage import HEARTBEAT_S, MAX_RETRIES
from hsa_compile.autotune.study.trials import (
    CHOOSING_S,
    CLAIMED,
    LEDGER,
    OUTCOME,
    OWNER,
    SKIPPED,
    Heartbeat,
    counts,
    is_choosing,
    is_skipped,
    is_stale,
    num_idle,
    this_process,
)
from hsa_compile.errors import StorageError
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

_MAX_IDLE_ASKS = 16  # after so many asks in a row that name nothing new, an untried point is drawn at random

MakeSampler = Callable[[int], optuna.samplers.BaseSampler]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A schedule that is this worker's to try, and the trial to tell the outcome to."""

    trial: optuna.Trial
    schedule: Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A schedule and what became of it; it is `counted` unless it was read from the ledger."""

    schedule: Schedule
    outcome: Outcome
    counted: bool


class TuningStudy:
    """A worker's view of a study; several workers, in processes or on hosts, may share one through its storage.

    A trial is RUNNING from when a worker asks for it until its outcome is told. If two workers come up with the same
    point, the one with the lower trial number has it. A trial whose process died is taken over as it stands, with its
    number and parameters, or, in a database, retried by Optuna; so a killed search goes on as if it had not been.

    Args:
        study: Optuna's study, which is there already.
        storage: what the study was opened in.
        problem, target: what is tuned.
        first: the schedules that are tried before anything is sampled.
        max_trials: the most trials that the study may have, by all workers.
        make_sampler: makes the sampler that chooses the trial with a given number.
        seed: decides the order in which points are drawn when the sampler has no new one.
        adopting: what is held while trials of dead processes are taken over.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: BaseStorage,
        problem: Problem,
        target: Target,
        *,
        first: Sequence[Schedule],
        max_trials: int,
        make_sampler: MakeSampler,
        seed: int = 0,
        adopting: AbstractContextManager[object] | None = None,
    ) -> None:
        self.study, self.problem, self.target = study, problem, target
        self.space = SearchSpace.of(problem, target)
        self.first, self.max_trials = list(first), max_trials
        self.heartbeat = Heartbeat(storage)
        self._make_sampler = make_sampler
        self._adopting = adopting or contextlib.nullcontext()
        self._has_heartbeat = isinstance(storage, RDBStorage)
        self._next_look = 0.0  # when to look for trials without a heartbeat again
        self._valid = list(self.space.schedules())
        random.Random(seed).shuffle(self._valid)
        self._schedules: dict[int, Schedule | None] = {}  # the schedules of finished trials, which do not change
        self._finished: dict[int, Finished | None] = {}

    def propose(self) -> Proposal | None:
        """Returns a point that nobody has tried or is trying; None if there is none, or the study has its trials."""
        while True:
            if self._has_heartbeat:
                self._retry_stale()
            elif (adopted := self._adopt()) is not None:
                return adopted
            trials = self._trials()
            taken = self._taken(trials)
            untried = next((schedule for schedule in self._valid if schedule not in taken), None)
            if untried is None or sum(map(counts, trials)) >= self.max_trials:
                return None
            wanted = next((schedule for schedule in self.first if schedule not in taken), None)
            if wanted is None and num_idle(trials) >= _MAX_IDLE_ASKS:
                wanted = untried
            trial = self._ask(trials, wanted)
            schedule = self._suggest(trial)
            trial.set_user_attr(CLAIMED, True)
            known = self._why_not(trial.number, schedule)
            if known is None:
                return Proposal(trial=trial, schedule=schedule)
            self._skip(trial, *known)

    def tell(self, proposal: Proposal, outcome: Outcome) -> None:
        """Finishes a trial: first its outcome is stored, then its state."""
        proposal.trial.set_user_attr(OUTCOME, outcome.to_dict())
        self._tell(proposal.trial, outcome.ratio)

    def release(self, proposal: Proposal) -> None:
        """Gives a trial back unfinished, so that whoever goes on with the study takes it over."""
        self.heartbeat.remove(proposal.trial._trial_id)
        proposal.trial.set_user_attr(OWNER, {})

    def add_known(self, known: Mapping[Schedule, Outcome]) -> None:
        """Puts what the ledger knows into a study that is still empty."""
        if self._trials():
            return
        for schedule, outcome in known.items():
            ratio = outcome.ratio
            self.study.add_trial(
                optuna.create_trial(
                    state=TrialState.FAIL if ratio is None else TrialState.COMPLETE,
                    value=ratio,
                    params=parameters_of(schedule),
                    distributions=distributions_of(schedule, self.space),
                    user_attrs={OUTCOME: outcome.to_dict(), LEDGER: True},
                )
            )

    def num_counted(self) -> int:
        """Counts the trials of all workers that `max_trials` limits: those being tried and those with an outcome."""
        return sum(map(counts, self._trials()))

    def expected_gain(self) -> float | None:
        """Returns what the sampler's model expects to gain (`SurrogateSampler.expected_gain`); None without a model."""
        sampler = self._make_sampler(0)
        return sampler.expected_gain(self.study) if isinstance(sampler, SurrogateSampler) else None

    def finished(self) -> list[Finished]:
        """Returns all points with an outcome, each once, in the order of their trials."""
        found: dict[Schedule, Finished] = {}
        for trial in self._trials():
            if trial.state.is_finished() and (finished := self._read(trial)) is not None:
                found.setdefault(finished.schedule, finished)
        return list(found.values())

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _read(self, trial: FrozenTrial) -> Finished | None:
        if trial.number not in self._finished:
            schedule, outcome = self._schedule(trial), trial.user_attrs.get(OUTCOME)
            self._finished[trial.number] = (
                None
                if schedule is None or outcome is None or not self.space.is_valid(schedule)
                else Finished(
                    schedule=schedule, outcome=Outcome.from_dict(outcome), counted=LEDGER not in trial.user_attrs
                )
            )
        return self._finished[trial.number]

    def _schedule(self, trial: FrozenTrial) -> Schedule | None:
        if not trial.state.is_finished():
            return schedule_of(trial.params, self.space)
        if trial.number not in self._schedules:
            self._schedules[trial.number] = schedule_of(trial.params, self.space)
        return self._schedules[trial.number]

    def _taken(self, trials: Sequence[FrozenTrial]) -> set[Schedule]:
        """Returns points that were tried, are being tried, or were given up as each process that tried them died."""
        deaths: Counter[Schedule] = Counter()
        taken: set[Schedule] = set()
        for trial in trials:
            schedule = self._schedule(trial)
            if schedule is None or is_skipped(trial) or trial.state == TrialState.WAITING:
                continue
            if trial.state.is_finished() and OUTCOME not in trial.user_attrs:
                deaths[schedule] += 1
            else:
                taken.add(schedule)
        return taken | {schedule for schedule, count in deaths.items() if count > MAX_RETRIES}

    def _ask(self, trials: Sequence[FrozenTrial], wanted: Schedule | None) -> optuna.Trial:
        """Takes a trial that waits, or makes one that carries its owner from the start."""
        number = next((trial.number for trial in trials if trial.state == TrialState.WAITING), len(trials))
        if number == len(trials):
            self.study.enqueue_trial(parameters_of(wanted) if wanted else {}, user_attrs={OWNER: this_process()})
        self.study.sampler = self._make_sampler(number)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Heartbeat of storage", UserWarning)  # `self.heartbeat` beats
            trial = self.study.ask()
        self._own(trial)
        return trial

    def _own(self, trial: optuna.Trial) -> None:
        self.heartbeat.add(trial._trial_id)
        if trial.user_attrs.get(OWNER) != this_process():
            trial.set_user_attr(OWNER, this_process())

    def _why_not(self, number: int, schedule: Schedule) -> tuple[str, float | None] | None:
        """Returns why a claimed point is not this trial's to try, and its value if that is known; None if it is.

        As in Lamport's bakery algorithm, a trial waits until all with lower numbers have claimed their points, then
        yields to any of them with the same one. If two choose at once, the later sees the earlier, in any storage.
        """
        if not self.space.is_valid(schedule):
            return "invalid", None
        give_up = time.monotonic() + CHOOSING_S
        trials = self._trials()
        while any(map(is_choosing, trials[:number])) and time.monotonic() < give_up:
            time.sleep(0.01)
            trials = self._trials()
        if sum(map(counts, trials[:number])) >= self.max_trials:
            return "surplus", None
        for other in trials:
            if other.number == number or is_skipped(other) or self._schedule(other) != schedule:
                continue
            if OUTCOME in other.user_attrs and other.state.is_finished():
                return "repeats", other.value
            if other.state == TrialState.RUNNING and other.number < number:
                return "taken", None
        return None

    def _suggest(self, trial: optuna.Trial) -> Schedule:
        try:
            return suggest(trial, self.space)
        except ValueError as error:  # a damaged trial has other choices for a knob, which Optuna takes for the study's
            raise StorageError(f"study {self.study.study_name} cannot go on, --force begins anew: {error}") from error

    def _skip(self, trial: optuna.Trial, reason: str, value: float | None) -> None:
        """Sends a point straight back to Optuna, at no cost."""
        trial.set_user_attr(SKIPPED, reason)
        self._tell(trial, value)

    def _tell(self, trial: optuna.Trial, value: float | None) -> None:
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        self.study.tell(trial, value, state=state, skip_if_finished=True)
        self.heartbeat.remove(trial._trial_id)

    def _adopt(self) -> Proposal | None:
        """Takes over the first trial whose process is gone; one whose outcome is there already is only told."""
        if not any(is_stale(trial) for trial in self._trials()):
            return None
        with self._adopting:
            stale = next((trial for trial in self._trials() if is_stale(trial)), None)
            if stale is None:
                return None
            self.study.sampler = self._make_sampler(stale.number)
            trial = optuna.Trial(self.study, stale._trial_id)
            self._own(trial)
        if OUTCOME in stale.user_attrs:
            self._tell(trial, Outcome.from_dict(stale.user_attrs[OUTCOME]).ratio)
            return self._adopt()
        schedule = self._suggest(trial)
        trial.set_user_attr(CLAIMED, True)
        if (known := self._why_not(trial.number, schedule)) is not None:
            self._skip(trial, *known)
            return self._adopt()
        return Proposal(trial=trial, schedule=schedule)

    def _retry_stale(self) -> None:
        """Has Optuna look for trials without a heartbeat, now and then."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + HEARTBEAT_S
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
