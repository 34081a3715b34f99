"""Which schedules there are for an op on a device, and which of them a problem can use: the only constraint set."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.target import Target

Choices = Mapping[str, Mapping[str, tuple[Knob, ...]]]

_TORCH_CHUNK = {
    "super_tile": (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
    "tile_rows": (256, 512, 1024, 2048, 4096, 8192, 16384),
}
_TORCH_TOKEN = {"block_t": (1, 4, 16, 64, 256)}
_WARPS = (1, 2, 4, 8)
_STAGES = (1, 2, 3, 4)
_TRITON_TOKEN = {"num_warps": _WARPS, "num_stages": _STAGES}
_TRITON_CHUNK = {
    "block_t": (1, 2, 4, 8, 16, 32, 64, 128),
    "segment": (256, 512, 1024, 2048),
    "num_warps": (4, 8),
    "num_stages": _STAGES,
}
_TRITON_TWO_PASS = {"block_t": _TRITON_CHUNK["block_t"], "num_warps": _WARPS, "num_stages": _STAGES}

# (op, template family) → dataflow → knob → what it may be
_CHOICES: Mapping[tuple[str, str], Choices] = {
    ("hsa_forward", "torch"): {"chunk": _TORCH_CHUNK, "token": _TORCH_TOKEN},
    ("hsa_backward", "torch"): {"chunk": _TORCH_CHUNK, "token": _TORCH_TOKEN},
    ("hsa_forward", "triton"): {"chunk": _TRITON_CHUNK, "token": _TRITON_TOKEN},
    ("hsa_backward", "triton"): {"chunk": _TRITON_CHUNK, "token": _TRITON_TWO_PASS},
}

_MAX_GATHER_BYTES = 1 << 28  # of one batched product of the PyTorch token dataflow
_MAX_TILE_ROWS = 256  # of one Triton tile: beyond, the accumulators spill on every GPU
_MIN_TILE_ROWS = 16  # what a matrix instruction needs


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """Fixed choices for each knob of one op in one template family.

    Attributes:
        op: the kernel.
        template: `triton` or `torch`.
        choices: dataflow → knob → allowed values, in a fixed order.
    """

    op: str
    template: str
    choices: Choices

    @staticmethod
    def of(problem: Problem, target: Target) -> "SearchSpace":
        """The space that serves a problem's op on a target."""
        key = (problem.op, target.template)
        return SearchSpace(op=problem.op, template=target.template, choices=_CHOICES[key])

    def is_valid(self, problem: Problem, schedule: Schedule, target: Target) -> bool:
        """Whether `schedule` can run `problem` on `target`."""
        return self.why_invalid(problem, schedule, target) is None

    def why_invalid(self, problem: Problem, schedule: Schedule, target: Target) -> str | None:
        """The first reason why `schedule` cannot run `problem` on `target`, or None if it can."""
        if reason := self._why_unknown(schedule):
            return reason
        if self.template == "torch":
            return _why_invalid_torch(problem, schedule)
        return _why_invalid_triton(problem, schedule, target)

    def fit(self, problem: Problem, schedule: Schedule) -> Schedule:
        """A schedule tuned for another size, with the knobs that count tokens cut to what this problem can use."""
        if self.template != "torch" or self._why_unknown(schedule):
            return schedule
        knobs = dict(schedule)
        tokens = next_power_of_2(problem.seq_len)
        if "super_tile" in knobs:
            knobs["super_tile"] = self._largest(schedule, "super_tile", tokens)
            knobs["tile_rows"] = self._largest(schedule, "tile_rows", knobs["super_tile"] * problem.group)
        if "block_t" in knobs:
            knobs["block_t"] = self._largest(schedule, "block_t", min(tokens, _MAX_GATHER_BYTES // _gathered(problem)))
        return Schedule.from_dict(knobs)

    def schedules(self, problem: Problem, target: Target) -> Iterator[Schedule]:
        """All valid schedules, in a fixed order."""
        for dataflow, knobs in self.choices.items():
            for values in itertools.product(*knobs.values()):
                schedule = Schedule.of(dataflow, **dict(zip(knobs, values, strict=True)))
                if self.is_valid(problem, schedule, target):
                    yield schedule

    def _largest(self, schedule: Schedule, knob: str, limit: int) -> int:
        """The knob's own value, or the largest choice within the limit, or the smallest there is."""
        choices = self.choices[schedule.dataflow][knob]
        return max((c for c in choices if c <= min(limit, schedule[knob])), default=choices[0])

    def _why_unknown(self, schedule: Schedule) -> str | None:
        if schedule.dataflow not in self.choices:
            return f"dataflow = {schedule.dataflow!r} is not one of {', '.join(self.choices)}"
        knobs = self.choices[schedule.dataflow]
        given = [name for name in schedule if name != "dataflow"]
        if set(given) != set(knobs):
            return f"the knobs of dataflow {schedule.dataflow} are {', '.join(knobs)}, not {', '.join(given) or 'none'}"
        for name, allowed in knobs.items():
            if schedule[name] not in allowed:
                return f"{name} = {schedule[name]!r} is not one of {', '.join(map(str, allowed))}"
        return None


def _why_invalid_torch(problem: Problem, schedule: Schedule) -> str | None:
    if schedule.dataflow == "token":
        gathered = schedule["block_t"] * _gathered(problem)
        if schedule["block_t"] != 1 and gathered > _MAX_GATHER_BYTES:
            return f"a block of {schedule['block_t']} tokens gathers {gathered} bytes, at most {_MAX_GATHER_BYTES}"
        if schedule["block_t"] > next_power_of_2(problem.seq_len):
            return f"block_t = {schedule['block_t']} is more than the {problem.seq_len} tokens there are"
        return None
    if schedule["tile_rows"] < problem.group:
        return f"tile_rows = {schedule['tile_rows']} is less than the {problem.group} rows of one token"
    smallest = _CHOICES[problem.op, "torch"]["chunk"]["super_tile"][0]
    if schedule["super_tile"] not in (smallest,) and schedule["super_tile"] > next_power_of_2(problem.seq_len):
        return f"super_tile = {schedule['super_tile']} is more than the {problem.seq_len} tokens there are"
    if schedule["tile_rows"] > schedule["super_tile"] * problem.group:
        return f"tile_rows = {schedule['tile_rows']} is more than the rows of a super-tile"
    return None


def _gathered(problem: Problem) -> int:
    """Bytes of keys and values that the PyTorch token dataflow gathers for one token."""
    return problem.top_k * problem.chunk_size * (problem.head_dim + problem.value_dim) * max(problem.itemsize, 4)


def _why_invalid_triton(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    if problem.dtype == "float64":
        return "dtype = 'float64' has no matrix instruction that Triton uses; use the CPU"
    if "block_t" in schedule:
        rows = schedule["block_t"] * next_power_of_2(problem.group)
        if not _MIN_TILE_ROWS <= rows <= _MAX_TILE_ROWS and schedule["block_t"] != 1:
            allowed = f"{_MIN_TILE_ROWS} … {_MAX_TILE_ROWS}"
            return f"block_t = {schedule['block_t']} makes tiles of {rows} rows, allowed are {allowed}"
    if problem.deterministic and schedule.dataflow == "chunk":
        return "dataflow = 'chunk' adds with atomics; a deterministic schedule is asked for"
    return None
