"""The default schedule of every op over the whole matrix of shapes, compiled: 0 bytes spilled, and it fits.

A few minutes of compiling, for `make test-all`; its rows are what `inspect --matrix` prints.
"""

import json
import os
import subprocess
import sys

import pytest

from hsa_compile.target import Target

pytest.importorskip("triton")

SCRIPT = """
import itertools, json, sys
from hsa_compile.kernels.ahead_of_time import compile_launches
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.problem import Problem
from hsa_compile.schedules.space import default_schedule
from hsa_compile.schedules.ops.hsa_attention.triton import least_shared_memory
from hsa_compile.target import Target

arch, dtype = sys.argv[1:]
target = Target.parse(arch)
ops = ("hsa_forward", False), ("hsa_backward", False), ("hsa_backward", True)
for (op, deterministic), D, G, C in itertools.product(ops, (64, 128), (1, 16), (32, 64, 128)):
    problem = Problem(op=op, seq_len=65536, num_heads=G, num_kv_heads=1, top_k=16, head_dim=D, chunk_size=C,
                      dtype=dtype, deterministic=deterministic)
    schedule = default_schedule(problem, target)
    kernels = compile_launches(compile_kernel(emit(problem, schedule, target)).module, target)
    most = max(kernel.shared_memory for kernel in kernels)
    for kernel in kernels:
        print(json.dumps({
            "what": f"{problem.describe()}: {schedule}", "name": kernel.name, "spills": kernel.spills,
            "most_shared": most, "least_shared": least_shared_memory(problem, schedule, target),
        }))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("sm_80", "bfloat16"),
        ("sm_90", "bfloat16"),
        ("sm_100", "bfloat16"),
        ("gfx942", "bfloat16"),
    ],
)
def test_whole_matrix_of_defaults_fits_and_does_not_spill(arch: str, dtype: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, arch, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len({row["what"] for row in rows}) == 36
    for row in rows:
        assert row["spills"] == 0, row
        assert row["least_shared"] <= row["most_shared"] <= Target.parse(arch).shared_memory, row
