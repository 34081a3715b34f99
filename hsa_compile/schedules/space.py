"""Which schedules there are for an op on a device, and which of them a problem can use: the only constraint set."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.hsa_decode import DECODE_CHOICES, fit_decode, why_not_decode
from hsa_compile.schedules.limits import (
    MAX_GATHER_BYTES,
    SMALLEST_CPP_SUPER_TILE,
    SMALLEST_SUPER_TILE,
    gathered_bytes,
    why_not_cpp,
    why_not_torch,
    why_not_triton,
)
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.schedules.select_chunks import SELECT_CHOICES, why_not_select
from hsa_compile.target import Target

_Knobs = Mapping[str, tuple[Knob, ...]]
Choices = Mapping[str, _Knobs]

_TORCH_CHUNK = {
    "super_tile": (SMALLEST_SUPER_TILE, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
    "tile_rows": (256, 512, 1024, 2048, 4096, 8192, 16384),
}
_TORCH_TOKEN = {"block_t": (1, 4, 16, 64, 256)}
_CPP_CHUNK = {
    "super_tile": (SMALLEST_CPP_SUPER_TILE, 256, *_TORCH_CHUNK["super_tile"]),
    "rows": (2, 3, 4, 6, 8, 12, 16, 24),
}
_CPP_CHUNK_BACKWARD = {**_CPP_CHUNK, "tile_rows": (48, 96, 192, 384)}
_WARPS, _STAGES = (2, 4, 8), (1, 2, 3, 4)
_CHUNK_WARPS, _CHUNK_STAGES = (4, 8), (1, 2, 3)
_BLOCK_T = (1, 2, 4, 8, 16, 32, 64, 128)
_TRITON_TOKEN: _Knobs = {"num_warps": _WARPS, "num_stages": _STAGES}
_TRITON_CHUNK: _Knobs = {
    "block_t": _BLOCK_T,
    "segment": (128, 512, 2048),
    "super_tile": (0, 1024, 4096),
    "num_warps": _CHUNK_WARPS,
    "num_stages": _CHUNK_STAGES,
}
# How the parts of one token's output, or dq, come together: added to memory, or summed by a second kernel.
_REDUCTIONS = ("atomic", "slots", "slots16")
_TRITON_CHUNK_FORWARD: _Knobs = {"reduce": _REDUCTIONS, **_TRITON_CHUNK}
_TRITON_CHUNK_BACKWARD: _Knobs = {"dq": _REDUCTIONS, **_TRITON_CHUNK, "segment": (0, *_TRITON_CHUNK["segment"])}
_TRITON_UNION: _Knobs = {
    "block_m": (1, 2, 4, 8, 16, 32, 64),
    "num_warps": _CHUNK_WARPS,
    "num_stages": _CHUNK_STAGES,
}
# dq and dw token by token or block by block, then dk and dv chunk by chunk
_TRITON_SECOND_PASS: _Knobs = {
    "dk_dv": ("together", "apart"),
    "block_t": _BLOCK_T[:-1],
    "chunk_warps": _CHUNK_WARPS,
    "chunk_stages": (1, 2),
}

_TRITON_BACKWARD: Choices = {
    "chunk": _TRITON_CHUNK_BACKWARD,
    "union": {**_TRITON_UNION, **_TRITON_SECOND_PASS},
    "token": {**_TRITON_TOKEN, **_TRITON_SECOND_PASS},
}

# (op, template family) → dataflow → knob → what it may be
_CHOICES: Mapping[tuple[str, str], Choices] = {
    ("hsa_forward", "torch"): {"chunk": _TORCH_CHUNK, "token": _TORCH_TOKEN},
    ("hsa_backward", "torch"): {"chunk": _TORCH_CHUNK, "token": _TORCH_TOKEN},
    ("hsa_forward", "cpp"): {"chunk": _CPP_CHUNK},
    ("hsa_backward", "cpp"): {"chunk": _CPP_CHUNK_BACKWARD},
    ("hsa_forward", "triton"): {"chunk": _TRITON_CHUNK_FORWARD, "union": _TRITON_UNION, "token": _TRITON_TOKEN},
    ("hsa_backward", "triton"): _TRITON_BACKWARD,
    **SELECT_CHOICES,
    **DECODE_CHOICES,
}

_CPP_DTYPES = ("float32", "bfloat16")


def template_for(problem: Problem, target: Target) -> str:
    """The template family that serves a problem: `triton` on a GPU, `cpp` where it can be built, else `torch`."""
    if target.kind != "cpu":
        return "triton"
    return "cpp" if target.has_compiler and problem.dtype in _CPP_DTYPES else "torch"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """Fixed choices for each knob of one op in one template family.

    Attributes:
        op: the kernel.
        template: `triton`, `cpp` or `torch`.
        choices: dataflow → knob → allowed values, in a fixed order.
    """

    op: str
    template: str
    choices: Choices

    @staticmethod
    def of(problem: Problem, target: Target) -> "SearchSpace":
        """The space that serves a problem's op on a target."""
        template = template_for(problem, target)
        return SearchSpace(op=problem.op, template=template, choices=_CHOICES[problem.op, template])

    def is_valid(self, problem: Problem, schedule: Schedule, target: Target) -> bool:
        """Whether `schedule` can run `problem` on `target`."""
        return self.why_invalid(problem, schedule, target) is None

    def why_invalid(self, problem: Problem, schedule: Schedule, target: Target) -> str | None:
        """The first reason why `schedule` cannot run `problem` on `target`, or None if it can."""
        if reason := self._why_unknown(schedule):
            return reason
        if problem.selects:
            return why_not_select(problem, schedule, target)
        if problem.decodes:
            return why_not_decode(problem, schedule, target)
        if self.template == "cpp":
            return why_not_cpp(problem, schedule, target)
        if self.template == "torch":
            return why_not_torch(problem, schedule)
        return why_not_triton(problem, schedule, target)

    def fit(self, problem: Problem, schedule: Schedule) -> Schedule:
        """A schedule tuned for another size, with the knobs that count tokens cut to what this problem can use."""
        if problem.selects or self._why_unknown(schedule):
            return schedule
        if problem.decodes:
            return fit_decode(problem, schedule)
        if self.template == "triton":
            return schedule
        tokens = next_power_of_2(problem.seq_len)
        if self.template == "cpp":
            return Schedule.from_dict({**schedule, "super_tile": self._largest(schedule, "super_tile", tokens)})
        if schedule.dataflow == "token":
            block_t = self._largest(schedule, "block_t", min(tokens, MAX_GATHER_BYTES // gathered_bytes(problem)))
            return Schedule.of("token", block_t=block_t)
        super_tile = self._largest(schedule, "super_tile", tokens)
        tile_rows = self._largest(schedule, "tile_rows", super_tile * problem.group)
        return Schedule.of("chunk", super_tile=super_tile, tile_rows=tile_rows)

    def schedules(self, problem: Problem, target: Target) -> Iterator[Schedule]:
        """All valid schedules, in a fixed order."""
        for dataflow, knobs in self.choices.items():
            for values in itertools.product(*knobs.values()):
                schedule = Schedule.of(dataflow, **dict(zip(knobs, values, strict=True)))
                if self.is_valid(problem, schedule, target):
                    yield schedule

    def _largest(self, schedule: Schedule, knob: str, limit: int) -> int:
        """The knob's own value, or the largest choice within the limit, or the smallest there is."""
        choices = [int(choice) for choice in self.choices[schedule.dataflow][knob]]
        return max((c for c in choices if c <= min(limit, schedule.number(knob))), default=choices[0])

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
