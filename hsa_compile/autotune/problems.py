"""Which problems a request stands for."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from hsa_compile.problem import DECODE_OPS, OPS, SELECT_OPS, Problem
from hsa_compile.target import Target

# What `tune` takes where nothing is said: the published HSA shapes (head group of 16, chunks of 64) at a size that
# a CPU tunes in two minutes, or at one that keeps a GPU busy.
_CPU_DEFAULTS = {
    "batch": 1, "seq_len": 4096, "num_heads": 16, "num_kv_heads": 1, "head_dim": 64, "chunk_size": 64, "top_k": 8,
    "dtype": "float32",
}  # fmt: skip
_GPU_DEFAULTS = {
    "batch": 1, "seq_len": 16384, "num_heads": 32, "num_kv_heads": 2, "head_dim": 128, "chunk_size": 64, "top_k": 16,
    "dtype": "bfloat16",
}  # fmt: skip


def default_fields(target: Target) -> dict[str, Any]:
    """Fields of the problem that stands for a target where a person names none."""
    return dict(_CPU_DEFAULTS if target.kind == "cpu" else _GPU_DEFAULTS)


def expand(target: Target, chosen: Mapping[str, Sequence[Any]], ops: Sequence[str] = OPS) -> list[Problem]:
    """Every combination of the chosen values, the rest by default; the ops of one shape stand side by side.

    Raises:
        InvalidProblem: a combination is not a problem.
    """
    fields = {name: (value,) for name, value in default_fields(target).items()}
    fields.update({name: tuple(values) for name, values in chosen.items() if values})
    shapes = [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
    return [_problem(op, shape) for shape in shapes for op in ops]


def _problem(op: str, shape: Mapping[str, Any]) -> Problem:
    """A retrieval head belongs to a kv head; its width is taken to be the same. A decoded token is the last of its
    sequence, which lies in pages."""
    if op in DECODE_OPS:
        return Problem(op=op, **{**shape, "seq_len": 1, "kv_len": shape["seq_len"], "paged": True})
    heads = {"num_heads": shape["num_kv_heads"]} if op in SELECT_OPS else {}
    return Problem(op=op, **{**shape, **heads})
