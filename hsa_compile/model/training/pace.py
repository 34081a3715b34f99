"""How fast a run goes: how long what is left of it will take, and which of its processes is slower than the others."""

import functools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hsa_compile.model.cost.info import training_flops
from hsa_compile.model.training.config import RunConfig
from hsa_compile.model.training.feed import apply_stage, lengths, plan_step, stage_ends
from hsa_compile.model.transformer import HSATransformer, empty_model

LEFT_OUT = 2  # how many first steps of a process do not count: they build kernels and touch memory for the first time
RECENT = 50  # how many of the latest steps count


class StepFlops:
    """Counts the FLOPs that all processes together make in a step, as its stage and the length of its rows have it.

    Args:
        run: the config of the run.
        world_size: among how many processes, or groups that share each row, a step's rows are divided.
    """

    def __init__(self, run: RunConfig, world_size: int) -> None:
        self._run, self._world_size = run, world_size
        self._counted: dict[tuple[int, int], float] = {}

    def __call__(self, number: int, length: int) -> float:
        """Returns the FLOPs of a step of that stage with rows of that length."""
        if (number, length) not in self._counted:
            stage = self._run.stages[number]
            rows = max(1, stage.batch_tokens // length)
            apply_stage(self._model, self._run.model_in(stage))
            together = max(1, rows // self._world_size // self._run.train.accumulation)
            others = (together - 1) * (length // self._run.model.chunk_size) if stage.in_batch_memory else 0
            self._counted[number, length] = rows * length * training_flops(self._model, length, others)
        return self._counted[number, length]

    @functools.cached_property
    def _model(self) -> HSATransformer:
        return empty_model(self._run.model)


class Pace:
    """Seconds per FLOP of the latest steps; what is left is counted in FLOPs, since the stages of a run differ in them.

    The pace is the median of those steps, since now and then one builds a kernel or follows a checkpoint.

    Args:
        run: the config of the run.
        world_size: among how many processes, or groups that share each row, a step's rows are divided.
        clock: gives the time in seconds.
    """

    def __init__(self, run: RunConfig, world_size: int, clock: Callable[[], float]) -> None:
        self._run, self._world_size, self._clock = run, world_size, clock
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._before = 0.0  # the time at which the record before came
        self._probe_seconds = 0.0
        self._flops = StepFlops(run, world_size)
        self.num_steps = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes the time since the record before; call it with each record of this process as it comes."""
        now = self._clock()
        if record.get("probe"):
            self._probe_seconds = now - self._before
        else:
            self.num_steps += 1
            if self.num_steps > LEFT_OUT:
                plan = plan_step(self._run, record["step"] - 1)
                self._recent.append((now - self._before) / self._flops(plan.stage, plan.length))
        self._before = now

    @property
    def is_known(self) -> bool:
        """Whether there were steps enough."""
        return bool(self._recent)

    def seconds_of(self, step: int) -> float:
        """Returns what that step takes, with the probe behind it if there is one; 0 before the pace is known."""
        seconds = next((seconds for _, seconds in self._stages(step)), 0.0) if self.is_known else 0.0
        return seconds + self._probe_seconds * (self._probes_before(step + 1) - self._probes_before(step))

    def seconds_left(self, step: int) -> float:
        """Returns the seconds until all steps from this one on, and all probes, are made."""
        probes = self._probes_before(self._run.train.steps) - self._probes_before(step)
        return sum(steps * seconds for steps, seconds in self._stages(step)) + probes * self._probe_seconds

    def steps_within(self, step: int, seconds: float) -> int:
        """Returns how many steps from this one on are made in so many seconds, to the nearest."""
        made, probe_every = 0, self._run.train.probe_every
        for steps, each in self._stages(step):
            if probe_every:
                each += self._probe_seconds / probe_every
            fitting = min(steps, max(0, round(seconds / each)))
            made += fitting
            if fitting < steps:
                break
            seconds -= steps * each
        return made

    def _stages(self, step: int) -> Iterator[tuple[int, float]]:
        """Yields how many steps are left of each stage, and the mean seconds of one over the stage's lengths."""
        pace = statistics.median(self._recent)
        for number, end in enumerate(stage_ends(self._run)):
            if step < end:
                flops = statistics.mean(self._flops(number, length) for length in lengths(self._run.stages[number]))
                yield end - step, pace * flops
                step = end

    def _probes_before(self, step: int) -> int:
        """Counts the probes that come before this step; one more follows the last step of a run."""
        train = self._run.train
        if not train.probe_every:
            return 0
        return -(-train.steps // train.probe_every) if step >= train.steps else step // train.probe_every


STRAGGLES = 1.25  # a process is named if its own time is so many times the median of all processes
FEWEST = 5  # so many steps are compared at least


class OwnTime:
    """How long this process works by itself: in the linear layers of the model, and until its batches are there.

    A step takes equally long in all processes, since they wait for each other. In a linear layer nothing is sent, so
    its time shows how fast the process is; a device measures it with events, which are read when a step is over.

    Args:
        model: the model whose linear layers are timed; None if they cannot be, as in compiled code.
        device: the device that they run on.
        clock: gives the time in seconds.
    """

    def __init__(
        self, model: nn.Module | None, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock, self._on_cuda = clock, device.type == "cuda"
        self._seconds, self._began = 0.0, None
        self._spans: list[tuple[Any, Any]] = []
        for module in model.modules() if model is not None else ():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts what the host does meanwhile."""
        began = self._clock()
        yield
        self._seconds += self._clock() - began

    def take(self) -> float:
        """Returns the seconds since the last call, 0 if no linear layer ran; all work of the device must be done."""
        seconds, self._seconds = self._seconds if self._spans else 0.0, 0.0
        for began, ended in self._spans:
            seconds += began.elapsed_time(ended) / 1e3 if self._on_cuda else ended - began
        self._spans.clear()
        return seconds

    def _begin(self, *_: object) -> None:
        self._began = self._now()

    def _end(self, *_: object) -> None:
        self._spans.append((self._began, self._now()))

    def _now(self) -> Any:
        if not self._on_cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def straggler(steps: Sequence[Sequence[float]]) -> tuple[int, float] | None:
    """Returns the process that is slower than the others, and how many times their median it takes; None if none is.

    Args:
        steps: for each of the latest steps, each process's own time for a token.
    """
    if len(steps) < FEWEST:
        return None
    own = [statistics.median(times) for times in zip(*steps, strict=True)]
    middle, slowest = statistics.median_low(own), max(range(len(own)), key=own.__getitem__)
    return (slowest, own[slowest] / middle) if own[slowest] > STRAGGLES * middle > 0 else None
