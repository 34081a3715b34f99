"""Where the time of a step goes, by op, so that all shares of a table make up the whole step; and what a model picks.

What one of our ops calls inside belongs to it. On a GPU the time of an op is that of the kernels which it launched.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from hsa_compile.errors import HSACompileError, InvalidArgument, SaveError
from hsa_compile.model.config import PREFILL, STEPS, TRAIN
from hsa_compile.model.data.documents import stdlib_sources
from hsa_compile.model.data.tokenizer import Tokenizer
from hsa_compile.model.inference.generate import evaluating
from hsa_compile.model.inference.inference import extend, new_state, prefill
from hsa_compile.model.layers.hs_attention import Selection
from hsa_compile.model.tensor_files import write_tensors
from hsa_compile.model.training.config import TrainConfig
from hsa_compile.model.training.feed import StepBatch, StepPlan
from hsa_compile.model.training.optimizer import make_optimizer
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.training.step import LossModel, run_step
from hsa_compile.model.transformer import HSATransformer
from hsa_compile.paths import quiet_profiler
from hsa_compile.problem import PICKS_ENDING

OURS = "hsa_compile::"
BETWEEN = "(between ops)"
IDLE = "(GPU idle)"
OTHER = "(kernels of no op)"
TRACE_ENDINGS = (".json", ".json.gz")
_STEP = "hsa-compile profile: one step"
_US = 1e-3  # in milliseconds
_LEAST_US = 1e-3  # a shorter time is what is left of a difference of sums
Step = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTime:
    """A row of the table.

    Attributes:
        name: the name of the op; what is no op stands in parentheses.
        self_ms: its own time, without that of the ops it calls; with it, where the op is ours.
        calls: how often it ran.
    """

    name: str
    self_ms: float
    calls: int

    @property
    def is_ours(self) -> bool:
        """Whether it is one of the tuned kernels."""
        return self.name.startswith(OURS)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """What a profile found.

    Attributes:
        step_ms: the whole step, by the profiler's clock.
        unprofiled_ms: the same step a moment before, without the profiler.
        ops: the longest first; their times sum to `step_ms`.
    """

    step_ms: float
    unprofiled_ms: float
    ops: tuple[OpTime, ...]

    def share(self, op: OpTime) -> float:
        """Returns an op's share of the step's time, 0 to 1."""
        return op.self_ms / self.step_ms

    @property
    def tuned_share(self) -> float:
        """The share of our ops together, 0 to 1."""
        return sum(self.share(op) for op in self.ops if op.is_ours)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        return {
            "step_ms": self.step_ms,
            "unprofiled_ms": self.unprofiled_ms,
            "tuned_share": self.tuned_share,
            "ops": [
                {"name": op.name, "self_ms": op.self_ms, "share": self.share(op), "calls": op.calls, "ours": op.is_ours}
                for op in self.ops
            ],
        }


def profile_step(
    step: Callable[[], object], device: torch.device, *, warmup: int = 2, trace: Path | None = None
) -> StepProfile:
    """Profiles one call of `step`.

    Args:
        step: what is profiled; it can be called again and again.
        device: the device that it computes on.
        warmup: how many calls come before; the first builds kernels.
        trace: where a Chrome trace of the profiled call is written, `.json` or `.json.gz`.

    Raises:
        InvalidArgument: warmup or the name of the trace is not allowed.
        SaveError: the trace cannot be written.
        HSACompileError: the profiler saw nothing on the GPU.
    """
    if warmup < 1:
        raise InvalidArgument(f"warmup = {warmup} must be at least 1: the first call builds kernels")
    if trace is not None:
        _check_trace(trace)
    quiet_profiler()
    for _ in range(warmup):
        step()
    with _profiler(device):
        step()  # the profiler itself needs a first time
    _wait(device)
    began = time.perf_counter()
    step()
    _wait(device)
    unprofiled = time.perf_counter() - began
    with _profiler(device) as profiler, record_function(_STEP):
        step()
        _wait(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    ops, total = _table(profiler.events(), on_gpu=device.type == "cuda")
    return StepProfile(step_ms=total, unprofiled_ms=1e3 * unprofiled, ops=ops)


@contextlib.contextmanager
def _profiler(device: torch.device) -> Iterator[torch.profiler.profile]:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.(profiler|autograd).*")  # what it says about itself
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            yield profiler


def _table(events: Sequence[Any], *, on_gpu: bool) -> tuple[tuple[OpTime, ...], float]:
    """Returns the rows, and the time of the step in milliseconds that they sum to."""
    (step,) = (event for event in events if event.name == _STEP and event.device_type == DeviceType.CPU)
    times: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in events:
        if event.device_type != DeviceType.CPU or not (on_gpu or event is step or _is_below(event, step)):
            continue
        owner = _owner(event)
        if owner.is_user_annotation:  # a part of the model, which is no op
            owner = step
        spent = sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total
        name = BETWEEN if owner is step else owner.name
        times[name] = times.get(name, 0.0) + spent
        calls[name] = calls.get(name, 0) + (event is owner)
    total = step.time_range.elapsed_us()
    if on_gpu:
        launched = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        if not launched:
            raise HSACompileError("the profiler saw no kernel on the GPU; KINETO_LOG_LEVEL=0 may tell why")
        times[OTHER] = sum(event.time_range.elapsed_us() for event in launched) - sum(times.values())
        times[IDLE] = total - sum(times.values())
    rows = [
        OpTime(name=name, self_ms=spent * _US, calls=calls.get(name, 1))
        for name, spent in times.items()
        if spent > _LEAST_US
    ]  # fmt: skip
    return tuple(sorted(rows, key=lambda op: -op.self_ms)), total * _US


def _is_below(event: Any, step: Any) -> bool:
    while event is not None and event is not step:
        event = event.cpu_parent
    return event is step


def _owner(event: Any) -> Any:
    """Returns the outermost of our ops that the event is part of, or the event if there is none."""
    owner, above = event, event
    while above is not None:
        owner = above if above.name.startswith(OURS) else owner
        above = above.cpu_parent
    return owner


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_trace(path: Path) -> None:
    """Checks the name before anything runs, since PyTorch says nothing of a file that it could not write."""
    if not path.name.endswith(TRACE_ENDINGS):
        raise InvalidArgument(f"trace {str(path)!r} must end in {' or '.join(TRACE_ENDINGS)}")
    try:
        path.touch()
    except OSError as error:
        raise SaveError(f"trace {path} cannot be written: {error.strerror}") from error


def make_step(kind: str, model: HSATransformer, *, batch: int, seq_len: int) -> Step:
    """Makes a step over random tokens that can be called again and again.

    Args:
        kind: `train`, one optimizer step over `batch` rows of `seq_len` tokens; `prefill`, reading them from the first
            token on; `decode`, one token for each row after so many were read.
        model: a model on its device; `train` moves its weights.
        batch, seq_len: how many rows, and tokens in each: at least 1, or 2 tokens for `train`.

    Raises:
        InvalidArgument: a value is not allowed.
    """
    least = 2 if kind == TRAIN else 1
    if kind not in STEPS or batch < 1 or seq_len < least:
        raise InvalidArgument(
            f"step {kind!r} with batch = {batch}, seq_len = {seq_len}; allowed are {', '.join(STEPS)}, a batch of at "
            f"least 1 and at least {least} tokens"
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch, seq_len), generator=generator)
    if kind == TRAIN:
        return _train(model, tokens)
    tokens = tokens.to(model.device)
    return _prefill(model, tokens) if kind == PREFILL else _decode(model, tokens)


def _train(model: HSATransformer, tokens: torch.Tensor) -> Step:
    config = TrainConfig(steps=1_000, lr=1e-5, warmup_steps=0)
    loss_model = LossModel(model.train(), config.loss_chunk)
    optimizer, processes = make_optimizer(model, config), Processes(device=model.device)
    weights = torch.ones(tokens.shape).index_fill(1, torch.tensor([0]), 0)
    rows = StepBatch(
        plan=StepPlan(step=0, stage=0, length=tokens.shape[1], num_rows=tokens.shape[0]),
        tokens=tokens,
        weights=weights,
        is_answer=torch.zeros(tokens.shape, dtype=torch.bool),
    )
    return lambda: run_step(loss_model, optimizer, rows, config, processes)


def _prefill(model: HSATransformer, tokens: torch.Tensor) -> Step:
    model.eval()
    return lambda: prefill(model, tokens, new_state(model, tokens.shape[0]))


def _decode(model: HSATransformer, tokens: torch.Tensor) -> Step:
    with evaluating(model):
        state = new_state(model, tokens.shape[0])
        prefill(model, tokens, state)
    model.eval()
    return lambda: extend(model, tokens[:, -1:], state)


def record_picks(model: HSATransformer, tokenizer: Tokenizer, path: Path, *, batch: int, seq_len: int) -> int:
    """Reads the sources of Python's standard library, and writes which chunks each retrieval picked.

    `kernels.hsa_attention.inputs.RecordedPicks` describes the file.

    Args:
        model: a trained model on its device.
        tokenizer: the model's.
        path: where the file is written, `.safetensors`.
        batch, seq_len: how many rows are read, one after the other in the text, and the tokens of each.

    Returns:
        how many retrievals the model has.

    Raises:
        InvalidArgument: the name of the file is not allowed, the model has no memory, or the rows hold no whole chunk.
        SaveError: the file cannot be written.
    """
    config = model.config
    if path.suffix != PICKS_ENDING:
        raise InvalidArgument(f"picks {str(path)!r} must end in {PICKS_ENDING}")
    if not config.has_memory or seq_len <= config.chunk_size:
        raise InvalidArgument(
            f"seq_len = {seq_len} with a model of variant {config.variant} gives no picks; a model with a memory "
            f"does, in texts longer than a chunk, {config.chunk_size}"
        )
    tokens = _library_tokens(tokenizer, batch * seq_len).view(batch, seq_len)
    selections: list[Selection] = []
    with evaluating(model), torch.no_grad():
        model.hidden(tokens.to(model.device), selections=selections)
    tensors = {"chunk_size": torch.tensor([config.chunk_size])}
    for number, one in enumerate(selections):
        tensors[f"layers.{number}.chunk_indices"] = one.indices.to("cpu", torch.int32)
        tensors[f"layers.{number}.chunk_weights"] = one.weights.to("cpu", torch.float32)
    write_tensors(path, tensors, {})
    return len(selections)


def _library_tokens(tokenizer: Tokenizer, count: int) -> torch.Tensor:
    """Returns the first tokens of the sources of the standard library, again from the start where they end."""
    found: list[int] = []
    sources = [Path(source.path) for source in stdlib_sources()]
    while len(found) < count:
        for source in sources:
            found += tokenizer.encode(source.read_text(encoding="utf-8", errors="replace")).tolist()
            if len(found) >= count:
                break
    return torch.tensor(found[:count])
