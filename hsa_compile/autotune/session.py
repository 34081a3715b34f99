"""The session of a search: its study, benches, compilers and ledger, which are opened and closed together.

It also chooses the schedules that a search tries first.
"""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import torch

from hsa_compile.autotune.bench.bench import Bench, LockedBench
from hsa_compile.autotune.bench.child import by_name
from hsa_compile.autotune.bench.device import device_lock, free_bytes
from hsa_compile.autotune.bench.isolation import CompilePool, Compiler, IsolatedBench, LibraryBuilder
from hsa_compile.autotune.cost.roofline import estimate
from hsa_compile.autotune.options import (
    OPEN_BENCH,
    Limits,
    TuneOptions,
    default_inputs,
    input_names,
    inputs_label,
)
from hsa_compile.autotune.samplers import STATELESS, make_sampler
from hsa_compile.autotune.samplers.point import parameters_of
from hsa_compile.autotune.search import SearchResult, search
from hsa_compile.autotune.study.ledger import Ledger, ProblemLedger
from hsa_compile.autotune.study.storage import close_storage, finish_study, lock_of, open_storage, open_study, question
from hsa_compile.autotune.study.study import MakeSampler, TuningStudy
from hsa_compile.kernels.hsa_attention.inputs import RecordedPicks
from hsa_compile.peaks import LIMITS
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.schedules.ops import backend_for
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

MAX_NEIGHBOURS = 3  # the most winners of other problems and devices that a search tries first
_MAX_COMPILERS = 16
_SEED_STEP = 1_000_003
_NUM_SEEDS = 2**32


def first_schedules(problem: Problem, target: Target) -> list[Schedule]:
    """Returns the default schedule, the nearest tuned one, other winners by distance, and the predicted fastest."""
    found = [default_schedule(problem, target), *_neighbours(problem, target), *_predicted_best(problem, target)]
    return list(dict.fromkeys(found))


def predicted_times(problem: Problem, schedules: Sequence[Schedule], target: Target) -> list[float] | None:
    """Returns the milliseconds that the model predicts for each; None where it does not know the target's peaks."""
    if target.arch not in LIMITS:
        return None
    return [estimate(problem, schedule, target) for schedule in schedules]


def _neighbours(problem: Problem, target: Target) -> Iterator[Schedule]:
    """Yields what a lookup would use, then winners for the same op and backend, also those on other devices."""
    cache, space = default_cache(), SearchSpace.of(problem, target)
    if found := cache.lookup(problem, target):
        yield found.schedule
    backend, key = backend_for(problem, target), ScheduleKey.of(problem, target)
    records = [
        record
        for _, record in cache.entries()
        if record.problem.op == problem.op
        and backend_for(record.problem, record.target) == backend
        and SearchSpace.of(record.problem, record.target).is_valid(record.schedule)
    ]
    records.sort(key=lambda record: _far(key, ScheduleKey.of(record.problem, record.target)))
    fitting = (
        space.fit(with_rows_kept(record.schedule, record.problem.group, problem.group, space)) for record in records
    )
    valid = dict.fromkeys(schedule for schedule in fitting if space.is_valid(schedule))
    yield from list(valid)[:MAX_NEIGHBOURS]


def with_rows_kept(schedule: Schedule, group: int, new_group: int, space: SearchSpace) -> Schedule:
    """Returns a schedule for another group size, whose tiles have as many rows, or nearly.

    A tile has a row for each head of a group, of each of its tokens or picks. What was the best for one group on an
    H100 is closer to the best for another with its rows kept than as it is (`benchmarks/first_tries.py`).

    Args:
        schedule: a schedule that was tuned.
        group: the group size that it was tuned for.
        new_group: the group size that it is to serve.
        space: the schedules of the problem that it is to serve, whose choices it is moved to.
    """
    knobs = ["block_entries", "block_tokens"]
    if schedule.dataflow == "fused":
        knobs += ["segment", "super_tile"]
    choices = space.choices.get(schedule.dataflow, {})
    kept = dict(schedule)
    for knob in knobs:
        if knob in schedule and knob in choices:
            wanted = math.log2(schedule.number(knob) * group / new_group)
            kept[knob] = min(choices[knob], key=lambda choice: abs(math.log2(int(choice)) - wanted))
    return Schedule.from_dict(kept)


def _far(key: ScheduleKey, other: ScheduleKey) -> tuple[int, float]:
    """Returns how many fields differ where they must match, then the distance in the others, to sort by."""
    return len(key.mismatches(other)), key.distance(other)


def _predicted_best(problem: Problem, target: Target) -> Iterator[Schedule]:
    valid = list(SearchSpace.of(problem, target).schedules())
    if (times := predicted_times(problem, valid, target)) is not None:
        yield valid[times.index(min(times))]


class Session:
    """An open search of one problem. Its workers share the study; each has a bench and a device of its own.

    Args:
        problem, target: what is tuned.
        devices: the devices at hand that the target stands for; workers are dealt out to them in turn.
        options: how the search is run.

    Attributes:
        inputs, label: the names of the distributions that it is for, and what records call them.

    Raises:
        InvalidArgument: the file of picks that the options name cannot be read, or does not fit the problem.
    """

    def __init__(self, problem: Problem, target: Target, devices: Sequence[str], options: TuneOptions) -> None:
        self.problem, self.target, self.options = problem, target, options
        self.devices = list(devices)
        self.distribution = options.distribution or default_inputs(target.kind)
        self.inputs, self.label = input_names(self.distribution), inputs_label(self.distribution)
        if self.label != self.distribution:  # whether the file fits is better known before a worker starts
            RecordedPicks.load(Path(self.distribution)).stretched(problem)
        self.first = first_schedules(problem, target)
        self._resources = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._make_sampler = _sampler_maker(problem, target, options)

    def __enter__(self) -> "Session":
        with contextlib.ExitStack() as opening:
            self.benches = [opening.enter_context(bench) for bench in self._make_benches()]
            self._pool = self._make_pool(opening)
            self.storage = open_storage(self.options.storage)
            opening.callback(close_storage, self.storage)
            asked = question(self.problem, self.target, inputs=self.label, seed=self.options.seed)
            self.study = open_study(self.storage, asked, anew=self.options.anew)
            self.ledger = self._open_ledger()
            self._resources = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @property
    def main_bench(self) -> Bench:
        """The bench that the play-off is held on."""
        return self.benches[0]

    def run(
        self, deadline: float, should_stop: Callable[[], bool], on_trial: Callable[[SearchResult], None]
    ) -> SearchResult:
        """Searches with all workers until each of them has ended.

        Raises:
            HSACompileError: the default schedule itself fails.
        """
        if len(self.benches) == 1:
            return self._search(self.main_bench, deadline, should_stop, on_trial)
        failed = threading.Event()

        def stop() -> bool:
            return failed.is_set() or should_stop()

        def report(result: SearchResult) -> None:
            with self._lock:
                on_trial(result)

        def work(bench: Bench) -> SearchResult:
            try:
                return self._search(bench, deadline, stop, report)
            except BaseException:
                failed.set()  # the others need not go on: the error ends the search
                raise

        with ThreadPoolExecutor(len(self.benches), thread_name_prefix="search") as threads:
            try:
                results = [threads.submit(work, bench) for bench in self.benches]
                return max((future.result() for future in results), key=lambda result: result.num_tried)
            finally:
                failed.set()

    def finish(self, record: TuningRecord) -> None:
        """Marks the study as done with a record, so that the next search of the same problem begins anew."""
        finish_study(self.study, record.to_dict())

    def _search(
        self, bench: Bench, deadline: float, should_stop: Callable[[], bool], on_trial: Callable[[SearchResult], None]
    ) -> SearchResult:
        return search(
            self._view(),
            bench,
            deadline=deadline,
            inputs=self.inputs,
            pool=self._pool,
            pause_to_time=self.target.kind == "cpu",
            until_within=self.options.until_within,
            ledger=self.ledger,
            should_stop=should_stop,
            on_trial=on_trial,
        )

    def _view(self) -> TuningStudy:
        """Returns one worker's view of the study; Optuna's object is not shared, since each worker has its sampler."""
        view = TuningStudy(
            optuna.load_study(study_name=self.study.study_name, storage=self.storage),
            self.storage,
            self.problem,
            self.target,
            first=self.first,
            max_trials=self.options.trials,
            make_sampler=self._make_sampler,
            seed=self.options.seed,
            adopting=lock_of(self.storage, self.options.storage),
        )
        if self.ledger is not None and not self.options.anew:
            with self._lock:
                view.add_known(self.ledger.known())
        return view

    def _make_benches(self) -> "list[contextlib.AbstractContextManager[Bench]]":
        options = self.options
        if not options.isolate:
            device = self.devices[0]
            bench = by_name(options.bench)(*self._bench_arguments(device))
            return [contextlib.nullcontext(LockedBench(bench, device_lock(device)))]
        count = max(options.workers, len(self.devices))
        return [self._isolated(self.devices[i % len(self.devices)]) for i in range(count)]

    def _isolated(self, device: str) -> IsolatedBench:
        return IsolatedBench(
            self.options.bench, self._bench_arguments(device), limits=self._limits(), lock=device_lock(device)
        )

    def _bench_arguments(self, device: str) -> tuple[object, ...]:
        return (self.problem, self.target, device, self.distribution, self.options.seed)

    def _limits(self) -> Limits:
        if self.options.limits is not None:
            return self.options.limits
        memory = free_bytes(torch.device("cpu")) if self.target.kind == "cpu" else None
        return Limits(memory_bytes=memory)

    def _make_pool(self, opening: contextlib.ExitStack) -> CompilePool | None:
        """Makes compilers for all cores, where compiling takes long; on a GPU one core is left to the bench."""
        backend = backend_for(self.problem, self.target)
        if not self.options.isolate or backend == "torch":
            return None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        size = max(1, min(cores - (self.target.kind != "cpu"), _MAX_COMPILERS))
        compilers: list[Compiler]
        if backend == "cpp" and self.options.bench == OPEN_BENCH:
            compilers = [LibraryBuilder(self.problem, self.target, self._limits()) for _ in range(size)]
        else:
            arguments = self._bench_arguments(self.devices[0])
            limits = self._limits()
            compilers = [IsolatedBench(self.options.bench, arguments, limits=limits) for _ in range(size)]
        return opening.enter_context(CompilePool(compilers))

    def _open_ledger(self) -> ProblemLedger | None:
        if self.options.ledger is None:
            return None
        ledger = Ledger(self.options.ledger)
        return ProblemLedger(ledger, self.problem, self.target, self.label, self.first[0])


def _sampler_maker(problem: Problem, target: Target, options: TuneOptions) -> MakeSampler:
    """Returns what makes the sampler for a trial by its number, so that a killed search goes on with equal proposals.

    Samplers that know nothing but the study's trials serve all of them. Optuna's carry a random state from one trial to
    the next, so each trial has a new one with a seed of its own.
    """
    valid = list(SearchSpace.of(problem, target).schedules())
    points = [parameters_of(schedule) for schedule in valid]
    prior = predicted_times(problem, valid, target)
    if options.sampler in STATELESS:
        shared = make_sampler(options.sampler, seed=options.seed, space_points=points, prior=prior)
        return lambda number: shared
    return lambda number: make_sampler(
        options.sampler, seed=(options.seed * _SEED_STEP + number) % _NUM_SEEDS, space_points=points, prior=prior
    )
