"""Emitted sources, kept as files: to be read, and to show what a change of a template does.

`pytest tests/kernels/test_goldens.py --refresh-goldens` writes them anew.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from hsa_compile import Problem, Schedule, Target, default_schedule
from hsa_compile.kernels.emit import emit
from hsa_compile.target import NAMED_TARGETS

GOLDENS = Path(__file__).parent / "goldens"
H100 = NAMED_TARGETS["sm_90"]
CPU = Target(kind="cpu", name="golden", arch="avx512", num_cores=2, has_compiler=True)
PROBLEM = Problem(seq_len=16384, num_heads=32, num_kv_heads=2, head_dim=128, top_k=16, dtype="bfloat16")
SMALL = Problem(seq_len=4096, num_heads=16, num_kv_heads=1, head_dim=64, top_k=8, dtype="float32")


def named(op: str, dataflow: str, seq_len: int = 16384) -> tuple[Problem, Schedule, Target]:
    """The first schedule of a dataflow on the H100, with the knobs of the default where it has that dataflow."""
    problem = replace(PROBLEM, op=op, seq_len=seq_len, deterministic=dataflow == "token" and op == "hsa_backward")
    schedule = default_schedule(problem, H100)
    assert schedule.dataflow == dataflow, schedule
    return problem, schedule, H100


CASES = {
    "forward_union_sm_90.py": lambda: named("hsa_forward", "union"),
    "forward_token_sm_90.py": lambda: (PROBLEM, Schedule.of("token", num_warps=4, num_stages=3), H100),
    "forward_chunk_sm_90.py": lambda: (
        replace(PROBLEM, num_heads=4, num_kv_heads=4, seq_len=4096),
        default_schedule(replace(PROBLEM, num_heads=4, num_kv_heads=4, seq_len=4096), H100),
        H100,
    ),
    "forward_fused_sm_90.py": lambda: (
        PROBLEM,
        Schedule.of(
            "fused",
            reduce="fused",
            window=0,
            super_tile=512,
            segment=16,
            unroll=8,
            discard=0,
            num_warps=4,
            num_stages=2,
        ),
        H100,
    ),
    "backward_fused_sm_90.py": lambda: named("hsa_backward", "fused"),
    "backward_chunk_sm_90.py": lambda: named("hsa_backward", "chunk", seq_len=4096),
    "forward_chunk_avx512.cpp": lambda: (SMALL, default_schedule(SMALL, CPU), CPU),
    "forward_chunk_torch.py": lambda: (
        SMALL,
        default_schedule(SMALL, replace(CPU, has_compiler=False)),
        replace(CPU, has_compiler=False),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_source_is_what_it_was(name: str, request: pytest.FixtureRequest) -> None:
    text = emit(*CASES[name]()).text
    path = GOLDENS / f"{name}.golden"
    if request.config.getoption("--refresh-goldens"):
        GOLDENS.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{name} differs; if it should, run pytest --refresh-goldens and read the diff"


def test_emitting_is_pure() -> None:
    case = named("hsa_backward", "fused")
    assert emit(*case) == emit(*case)
