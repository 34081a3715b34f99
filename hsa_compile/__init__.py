"""Compiler-style autotuning for Hierarchical Sparse Attention."""

import importlib
from typing import TYPE_CHECKING, Any

from hsa_compile.log import set_up_logging

if TYPE_CHECKING:
    from hsa_compile.autotune.bench.bench import measure
    from hsa_compile.autotune.cost.predict_schedule import predict_schedule
    from hsa_compile.autotune.tune import set_autotune, tune
    from hsa_compile.errors import HSACompileError
    from hsa_compile.kernels.compile import Kernel, compile_kernel
    from hsa_compile.kernels.emit import KernelSource, emit
    from hsa_compile.kernels.hsa_attention.op import hsa_attention
    from hsa_compile.kernels.hsa_attention.reference import hsa_attention_reference
    from hsa_compile.kernels.hsa_decode.op import hsa_decode
    from hsa_compile.kernels.hsa_decode.reference import hsa_decode_reference
    from hsa_compile.kernels.ops import check
    from hsa_compile.kernels.resolve import resolve
    from hsa_compile.kernels.select_chunks.op import select_chunks
    from hsa_compile.kernels.select_chunks.reference import select_chunks_reference
    from hsa_compile.problem import Problem
    from hsa_compile.schedules.cache import ScheduleCache, default_cache, tuned_for
    from hsa_compile.schedules.lookup import Lookup
    from hsa_compile.schedules.record import Measurement, TuningRecord
    from hsa_compile.schedules.schedule import Schedule
    from hsa_compile.schedules.space import SearchSpace, default_schedule
    from hsa_compile.target import Target

__version__ = "0.1.0"

__all__ = [
    "HSACompileError",
    "Kernel",
    "KernelSource",
    "Lookup",
    "Measurement",
    "Problem",
    "Schedule",
    "ScheduleCache",
    "SearchSpace",
    "Target",
    "TuningRecord",
    "check",
    "compile_kernel",
    "default_cache",
    "default_schedule",
    "emit",
    "hsa_attention",
    "hsa_attention_reference",
    "hsa_decode",
    "hsa_decode_reference",
    "measure",
    "predict_schedule",
    "resolve",
    "select_chunks",
    "select_chunks_reference",
    "set_autotune",
    "tune",
    "tuned_for",
]

# Where each name is defined. A name is imported when it is first asked for, so that the command line answers --help
# without PyTorch, and a process that only runs kernels never loads Optuna.
_HOMES = {
    "HSACompileError": "hsa_compile.errors",
    "Kernel": "hsa_compile.kernels.compile",
    "KernelSource": "hsa_compile.kernels.emit",
    "Lookup": "hsa_compile.schedules.lookup",
    "Measurement": "hsa_compile.schedules.record",
    "Problem": "hsa_compile.problem",
    "Schedule": "hsa_compile.schedules.schedule",
    "ScheduleCache": "hsa_compile.schedules.cache",
    "SearchSpace": "hsa_compile.schedules.space",
    "Target": "hsa_compile.target",
    "TuningRecord": "hsa_compile.schedules.record",
    "check": "hsa_compile.kernels.ops",
    "compile_kernel": "hsa_compile.kernels.compile",
    "default_cache": "hsa_compile.schedules.cache",
    "default_schedule": "hsa_compile.schedules.space",
    "emit": "hsa_compile.kernels.emit",
    "hsa_attention": "hsa_compile.kernels.hsa_attention.op",
    "hsa_attention_reference": "hsa_compile.kernels.hsa_attention.reference",
    "hsa_decode": "hsa_compile.kernels.hsa_decode.op",
    "hsa_decode_reference": "hsa_compile.kernels.hsa_decode.reference",
    "measure": "hsa_compile.autotune.bench.bench",
    "predict_schedule": "hsa_compile.autotune.cost.predict_schedule",
    "resolve": "hsa_compile.kernels.resolve",
    "select_chunks": "hsa_compile.kernels.select_chunks.op",
    "select_chunks_reference": "hsa_compile.kernels.select_chunks.reference",
    "set_autotune": "hsa_compile.autotune.tune",
    "tune": "hsa_compile.autotune.tune",
    "tuned_for": "hsa_compile.schedules.cache",
}
_OPS = ("hsa_attention", "select_chunks", "hsa_decode")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The ops come together, so that whoever imports one finds all of torch.ops.hsa_compile.
    for each in _OPS if name in _OPS else (name,):
        globals()[each] = getattr(importlib.import_module(_HOMES[each]), each)
    if name in _OPS:  # the cache is read now, not by the first call of an op
        importlib.import_module("hsa_compile.schedules.cache").default_cache()
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


set_up_logging()
