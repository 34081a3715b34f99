"""A new op is a row in each table and a template: here one is added from outside, tuned, stored and run.

The toy is the mean of each chunk of keys, a first guess at a landmark.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hsa_compile import Problem, Schedule, Target, default_cache, emit, resolve, tune
from hsa_compile.errors import InvalidProblem, UntunedWarning, WrongResult
from hsa_compile.kernels import emit as emit_module
from hsa_compile.kernels.compare import TOLERANCES, compare
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.ops import OP_KERNELS, OpKernels, check, inputs_of
from hsa_compile.problem import ALL_OPS
from hsa_compile.schedules import ops as schedule_ops
from hsa_compile.schedules.ops import OP_BACKENDS
from hsa_compile.schedules.ops.backend import OpBackend, Work, keep

OP = "chunk_mean"
SHAPE = {"seq_len": 70, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "chunk_size": 16, "top_k": 1}
TEMPLATE = '''{{ header }}
import torch
from torch import Tensor

CHUNK_SIZE = {{ problem.chunk_size }}
BLOCK_CHUNKS = {{ schedule["block_chunks"] }}


def chunk_mean(k: Tensor) -> Tensor:
    """Means [B, N, H, D] of the whole chunks of keys [B, S, H, D]."""
    num_chunks = k.shape[1] // CHUNK_SIZE
    whole = k[:, : num_chunks * CHUNK_SIZE].unflatten(1, (num_chunks, CHUNK_SIZE))
    return torch.cat([part.mean(dim=2) for part in whole.split(BLOCK_CHUNKS, dim=1)], dim=1)
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    k: Tensor

    def arguments(self, op: str) -> tuple[Tensor | None, ...]:
        return (self.k,)

    def options(self, op: str) -> dict[str, Any]:
        return {}

    def call(self, problem: Problem) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return (self.k,), {}

    def filled(self) -> float:
        return 1.0


def make_inputs(problem: Problem, device: torch.device, *, distribution: str = "random", seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(problem.batch, problem.kv_len, problem.num_kv_heads, problem.head_dim, generator=generator)
    return Inputs(k=k.to(device, getattr(torch, problem.dtype)))


def check_means(kernel: Kernel, problem: Problem, inputs: Inputs) -> None:
    chunks = [inputs.k[:, c * problem.chunk_size :][:, : problem.chunk_size] for c in range(problem.num_chunks)]
    expected = torch.stack([chunk.double().sum(dim=1) / problem.chunk_size for chunk in chunks], dim=1)
    compare("means", kernel.entry(inputs.k), expected, TOLERANCES[problem.dtype], "all chunks")


TORCH = OpBackend(
    name="torch",
    choices={"plain": {"block_chunks": (1, 2, 8)}},
    why_not=lambda problem, schedule, target: (
        "block_chunks = 8 is more than there are" if schedule["block_chunks"] == 8 > problem.num_chunks else None
    ),
    fit=keep,
    defaults=lambda problem, target: [Schedule.of("plain", block_chunks=2)],
    work=lambda problem, schedule: Work(flops=1.0, memory_bytes=1.0, cache_bytes=1.0),
)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Problem]:
    """The toy's problem, while the tables have its rows."""
    templates = tmp_path / "templates"
    (templates / "torch" / OP).mkdir(parents=True)
    (templates / "torch" / OP / "plain.py.jinja").write_text(TEMPLATE)
    monkeypatch.setattr("hsa_compile.problem.ALL_OPS", (*ALL_OPS, OP))
    monkeypatch.setitem(OP_BACKENDS, (OP, "torch"), TORCH)
    monkeypatch.setitem(OP_KERNELS, OP, OpKernels(make_inputs=make_inputs, check=check_means))
    monkeypatch.setattr("hsa_compile.kernels.emit.TEMPLATE_DIR", templates)
    monkeypatch.setattr(schedule_ops, "TEMPLATE_DIR", templates)
    _forget()
    yield Problem(op=OP, **SHAPE)
    _forget()


def _forget() -> None:
    emit_module._environment.cache_clear()
    schedule_ops._digest.cache_clear()


def test_an_op_that_the_tables_know_is_tuned_stored_and_run(toy: Problem) -> None:
    target = Target.parse("cpu")
    record = tune(toy, trials=10, timeout=600, isolate=False, on_record=default_cache().put)
    assert record.shortfall is None
    assert record.trials == 2  # the third choice has more chunks than there are
    kernel = resolve(toy, target)
    assert kernel.source.schedule == record.schedule
    inputs = inputs_of(toy, torch.device("cpu"), seed=3)
    check(kernel, toy, inputs)
    wrong = Kernel(source=kernel.source, path=kernel.path, entry=lambda k: 2 * kernel.entry(k), module=kernel.module)
    with pytest.raises(WrongResult, match="means is off by"):
        check(wrong, toy, inputs)


def test_without_its_rows_no_table_knows_it() -> None:
    with pytest.raises(InvalidProblem, match="op = 'chunk_mean' is not one of hsa_forward"):
        Problem(op=OP, **SHAPE)


def test_an_op_without_a_row_for_a_backend_raises(toy: Problem) -> None:
    with pytest.raises(KeyError):
        emit(toy, Schedule.of("plain", block_chunks=2), Target.parse("sm_90"))
    with pytest.warns(UntunedWarning):
        assert resolve(toy, Target.parse("cpu")).source.backend == "torch"
