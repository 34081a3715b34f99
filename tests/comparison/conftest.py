"""Tiny cases on this CPU; kernels are PyTorch here, since to build C++ takes seconds."""

from collections.abc import Callable

import pytest
import torch

from hsa_compile.comparison import DECODE, KINDS, SELECT
from hsa_compile.comparison.contender import Case
from hsa_compile.problem import Problem

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _without_compiler(without_compiler: None) -> None:
    """All of them."""


@pytest.fixture
def problem_of() -> Callable[..., Problem]:
    """A tiny problem of a kind: an odd length, two kv heads, a tail that is no whole chunk."""

    def make(kind: str, length: int = 203, dtype: str = "float32") -> Problem:
        decodes = kind == DECODE
        return Problem(
            op=KINDS[kind], seq_len=1 if decodes else length, kv_len=length // 16 * 16 if decodes else length,
            num_heads=2 if kind == SELECT else 4, num_kv_heads=2, head_dim=16, chunk_size=16, top_k=3, dtype=dtype,
            paged=decodes,
        )  # fmt: skip

    return make


@pytest.fixture
def case_of(problem_of: Callable[..., Problem]) -> Callable[..., Case]:
    def make(kind: str, length: int = 203, dtype: str = "float32") -> Case:
        return Case.of(kind, problem_of(kind, length, dtype), CPU)

    return make
