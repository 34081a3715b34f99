"""Compiler-style autotuning for Hierarchical Sparse Attention."""

import importlib
from typing import TYPE_CHECKING, Any

from hsa_compile.errors import HSACompileError
from hsa_compile.kernels.compile import Kernel, compile_kernel
from hsa_compile.kernels.decode_reference import hsa_decode_reference
from hsa_compile.kernels.emit import KernelSource, emit
from hsa_compile.kernels.hsa_attention import hsa_attention
from hsa_compile.kernels.hsa_decode import hsa_decode
from hsa_compile.kernels.reference import hsa_attention_reference
from hsa_compile.kernels.resolve import resolve
from hsa_compile.kernels.select_chunks import select_chunks
from hsa_compile.kernels.select_reference import select_chunks_reference
from hsa_compile.log import set_up_logging
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import ScheduleCache, default_cache, tuned_for
from hsa_compile.schedules.lookup import Lookup
from hsa_compile.schedules.record import Measurement, TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

if TYPE_CHECKING:
    from hsa_compile.autotune.check import check
    from hsa_compile.autotune.measure import measure
    from hsa_compile.autotune.on_miss import set_autotune
    from hsa_compile.autotune.predicted import predict_schedule
    from hsa_compile.autotune.tune import tune

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

# Tuning needs Optuna, which takes longer to import than all of the rest: a process that only runs never pays.
_LAZY = {
    "check": "hsa_compile.autotune.check",
    "measure": "hsa_compile.autotune.measure",
    "predict_schedule": "hsa_compile.autotune.predicted",
    "set_autotune": "hsa_compile.autotune.on_miss",
    "tune": "hsa_compile.autotune.tune",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


set_up_logging()
default_cache()
