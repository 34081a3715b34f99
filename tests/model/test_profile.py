"""A profile: every share is of the same whole, ours hold what they call, and a GPU's idle time is counted."""

import gzip
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from small_models import build, small_config
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import Interval

from hsa_compile.errors import HSACompileError, InvalidArgument, SaveError
from hsa_compile.model.config import DECODE, PREFILL, STEPS, TRAIN
from hsa_compile.model.cost.profile import BETWEEN, IDLE, OTHER, _table, make_step, profile_step

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning"),
    pytest.mark.usefixtures("without_compiler"),  # kernels that are PyTorch call ops of their own
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TRAIN, *(pytest.param(k, marks=pytest.mark.exhaustive) for k in STEPS if k != TRAIN)])
def test_the_shares_sum_to_the_whole_step(kind: str) -> None:
    model = build(small_config("hsa-ultralong"))
    found = profile_step(make_step(kind, model, batch=2, seq_len=40), CPU)
    assert sum(op.self_ms for op in found.ops) == pytest.approx(found.step_ms, rel=1e-6)
    assert sum(map(found.share, found.ops)) == pytest.approx(1, rel=1e-6)
    assert [op.self_ms for op in found.ops] == sorted((op.self_ms for op in found.ops), reverse=True)
    assert found.unprofiled_ms > 0


def test_the_step_is_as_long_as_the_clock_says() -> None:
    seconds = []

    def step() -> None:
        began = time.perf_counter()
        torch.ones(300, 300) @ torch.ones(300, 300)
        seconds.append(time.perf_counter() - began)

    found = profile_step(step, CPU)
    assert 1e3 * seconds[-1] <= found.step_ms  # the clock is read inside the step
    assert [op.calls for op in found.ops if op.name == "aten::mm"] == [1]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (TRAIN, {"hsa_forward", "hsa_backward", "select_chunks", "select_chunks_backward"}),
        (PREFILL, {"hsa_forward", "select_chunks"}),
        (DECODE, {"hsa_decode"}),
    ],
)
@pytest.mark.slow
def test_tuned_kernels_are_counted_with_all_that_they_call(kind: str, names: set[str]) -> None:
    model = build(small_config("hsa-ultralong"))
    found = profile_step(make_step(kind, model, batch=1, seq_len=40), CPU)
    ours = {op.name.removeprefix("hsa_compile::"): op for op in found.ops if op.is_ours}
    assert names <= set(ours)
    assert 0 < found.tuned_share < 1
    assert found.tuned_share == pytest.approx(sum(op.self_ms for op in ours.values()) / found.step_ms)


def test_the_parts_of_a_model_are_no_ops_of_the_table() -> None:
    found = profile_step(make_step(PREFILL, build(small_config("hsa-ultralong")), batch=1, seq_len=40), CPU)
    assert not {"layer 0", "MLP", "retrieval", "chunk encoder"} & {op.name for op in found.ops}
    assert not [op for op in found.ops if "|" in op.name]


def test_a_baseline_has_no_tuned_kernel() -> None:
    found = profile_step(make_step(PREFILL, build(small_config("swa")), batch=1, seq_len=20), CPU)
    assert found.tuned_share == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step.json.gz", pytest.param("step.json", marks=pytest.mark.exhaustive)])
def test_a_trace_is_written_that_a_browser_reads(name: str, tmp_path: Path) -> None:
    profile_step(
        make_step(PREFILL, build(small_config("hsa-ultralong")), batch=1, seq_len=40), CPU, trace=tmp_path / name
    )
    raw = (tmp_path / name).read_bytes()
    events = json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert "hsa_compile::hsa_forward" in names
    assert {"layer 0", "layer 1", "window mixer", "chunk encoder", "retrieval", "memory attention", "MLP"} <= names
    problem = r"hsa_forward B1 T\d+ HQ\d+ H\d+ D\d+ C\d+ K\d+ float32.*"
    assert any(re.fullmatch(rf"{problem} \| \w+( \w+=\S+)*", name) for name in names), sorted(names)


def test_a_trace_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    def step() -> None:
        raise AssertionError("nothing shall run")

    with pytest.raises(SaveError, match="No such file"):
        profile_step(step, CPU, trace=tmp_path / "none" / "step.json")
    with pytest.raises(InvalidArgument, match=r"'step.txt' must end in \.json or \.json\.gz"):
        profile_step(step, CPU, trace=Path("step.txt"))
    with pytest.raises(InvalidArgument, match="warmup = 0"):
        profile_step(step, CPU, warmup=0)


def test_steps_need_something_to_do() -> None:
    model = build(small_config("hsa-ultralong"))
    with pytest.raises(InvalidArgument, match=r"'sleep' .*allowed are train, prefill, decode"):
        make_step("sleep", model, batch=1, seq_len=8)
    with pytest.raises(InvalidArgument, match="at least 2 tokens"):
        make_step(TRAIN, model, batch=1, seq_len=1)


def test_decoding_reads_one_token_more_each_time() -> None:
    model = build(small_config("hsa-ultralong"))
    step = make_step(DECODE, model, batch=2, seq_len=9)
    assert step().shape == step().shape == (2, 1, model.config.vocab_size)  # type: ignore[attr-defined]


# --- what a GPU reports, by hand: there is none where these tests run


@dataclass
class Kernel:
    duration: float


@dataclass(eq=False)
class Event:
    name: str
    start: float
    end: float
    parent: "Event | None" = None
    launched: Sequence[float] = ()
    device_type: DeviceType = DeviceType.CPU
    is_user_annotation: bool = False
    kernels: list[Kernel] = field(init=False)

    def __post_init__(self) -> None:
        self.kernels, self.cpu_parent = [Kernel(us) for us in self.launched], self.parent
        self.time_range = Interval(self.start, self.end)


def test_a_gpu_that_shows_no_kernel_is_an_error() -> None:
    with pytest.raises(HSACompileError, match="saw no kernel"):
        _table([Event("hsa-compile profile: one step", 0, 100)], on_gpu=True)


def test_on_a_gpu_ops_have_the_time_of_their_kernels_and_the_rest_is_named() -> None:
    step = Event("hsa-compile profile: one step", 0, 100)
    layer = Event("layer 0", 1, 20, step, is_user_annotation=True)
    attention = Event("hsa_compile::hsa_forward", 1, 9, layer)
    events = [
        step,
        layer,
        attention,
        Event("hsa_forward B1 T9 | chunk", 1, 9, attention, [40.0], is_user_annotation=True),
        Event("aten::fill_", 2, 3, attention, [5.0]),
        Event("cudaLaunchKernel", 2, 3, attention),
        Event("aten::mm", 10, 12, step, [20.0, 10.0]),
        Event("AddBackward0", 20, 21, None, [3.0]),  # the backward pass has a thread of its own
        *(
            Event("kernel", start, start + us, device_type=DeviceType.CUDA)
            for start, us in ((5, 40), (45, 5), (50, 20), (70, 10), (80, 3), (83, 2))
        ),
        Event("hsa-compile profile: one step", 5, 83, device_type=DeviceType.CUDA, is_user_annotation=True),
    ]
    rows, step_ms = _table(events, on_gpu=True)
    found = {op.name: (pytest.approx(1e3 * op.self_ms), op.calls) for op in rows}
    assert found == {
        "hsa_compile::hsa_forward": (45, 1),
        "aten::mm": (30, 1),
        "AddBackward0": (3, 1),
        OTHER: (2, 1),
        IDLE: (20, 1),
    }
    assert sum(op.self_ms for op in rows) == pytest.approx(step_ms) == pytest.approx(0.1)
    assert BETWEEN not in found
