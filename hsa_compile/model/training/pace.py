"""How fast a run goes, and from that how long what is left of it will take."""

import functools
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hsa_compile.model.cost.info import training_flops
from hsa_compile.model.training.config import RunConfig
from hsa_compile.model.training.feed import apply_stage, lengths, plan_step, stage_ends
from hsa_compile.model.transformer import HSATransformer, empty_model

LEFT_OUT = 2  # how many first steps of a process do not count: they build kernels and touch memory for the first time
RECENT = 50  # how many of the latest steps count


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
        self._flops = functools.cache(self._count_flops)
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

    def _count_flops(self, number: int, length: int) -> float:
        """Returns the FLOPs that all processes together make in a step of that stage with rows of that length."""
        stage = self._run.stages[number]
        rows = max(1, stage.batch_tokens // length)
        apply_stage(self._model, self._run.model_in(stage))
        together = max(1, rows // self._world_size // self._run.train.accumulation)
        others = (together - 1) * (length // self._run.model.chunk_size) if stage.in_batch_memory else 0
        return rows * length * training_flops(self._model, length, others)

    @functools.cached_property
    def _model(self) -> HSATransformer:
        return empty_model(self._run.model)
