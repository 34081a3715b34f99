"""The emitted Triton kernels, compiled for GPUs that are not there: they fit, do not spill, and use the matrix units.

A process either interprets kernels, as the other tests do, or compiles them: all compiling is in one other process.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hsa_compile
from hsa_compile.errors import CompileError
from hsa_compile.kernels.ahead_of_time import compile_launches
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.problem import Problem
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_90", "gfx942", "sm_100")
GROUPS = (1, 4, 16)
TOKEN_INSTRUCTION = {"sm_80": "HMMA", "sm_90": "HMMA", "gfx942": "MFMA", "sm_100": "HMMA"}  # too few rows for more
CHUNK_INSTRUCTION = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "MFMA", "sm_100": "UTCHMMA"}

# Every dataflow and reduction, for groups of three.
_SECOND_PASS = "block_entries=16 chunk_warps=4 chunk_stages=2 num_warps=4 num_stages=2"
_CHUNK = "block_entries=16 num_warps=4 num_stages=2 super_tile=1024"
SCHEDULES = {
    "hsa_forward": [
        "token num_warps=4 num_stages=2",
        "fused reduce=fused window=0 super_tile=128 segment=16 unroll=8 discard=0 num_warps=4 num_stages=2",
        "fused reduce=slots window=0 super_tile=128 segment=16 unroll=8 discard=0 num_warps=4 num_stages=2",
        "union block_tokens=8 num_warps=4 num_stages=2",
        *(f"chunk reduce={reduction} segment=128 {_CHUNK}" for reduction in ("atomic", "slots", "slots16")),
    ],
    "hsa_backward": [
        f"token dk_dv=together {_SECOND_PASS}",
        "fused reduce=fused window=0 super_tile=128 segment=32 unroll=8 discard=0 num_warps=8 num_stages=2",
        f"union dk_dv=apart block_tokens=8 {_SECOND_PASS}",
        *(f"chunk reduce={dq} segment={segment} {_CHUNK}" for dq in ("atomic", "slots16") for segment in (0, 128)),
        "chunk reduce=slots segment=0 block_entries=8 num_warps=4 num_stages=1 super_tile=0",
    ],
}

# Of tiles with the 64 rows that Hopper's matrix instructions take, with loops that run ahead.
GATHERING = {
    "hsa_forward": [
        "fused reduce=fused window=0 super_tile=128 segment={} unroll=8 discard=1 num_warps=4 num_stages=2",
        *(f"union block_tokens={{}} num_warps=4 num_stages={stages}" for stages in (2, 3)),
        *(
            f"chunk reduce=slots16 segment=128 block_entries={{}} num_warps=4 num_stages={s} super_tile=0"
            for s in (2, 3)
        ),
    ],
    "hsa_backward": [
        *(
            f"fused reduce={dq} window=0 super_tile=128 segment=64 unroll=8 discard=0 num_warps=8 num_stages=2"
            for dq in ("atomic", "slots", "fused")
        ),
        "union dk_dv=together block_tokens={0} num_warps=8 num_stages=2 block_entries={0} chunk_warps=4 chunk_stages=2",
        *(
            f"chunk reduce={dq} segment=128 block_entries={{}} num_warps=8 num_stages=2 super_tile=0"
            for dq in ("atomic", "slots")
        ),
    ],
}

SCRIPT = """
import itertools, json, sys
from dataclasses import asdict, replace
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from hsa_compile.errors import CompileError, OutOfResources
from hsa_compile.kernels.ahead_of_time import compile_launches, source_of
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.ops import inputs_of
from hsa_compile.problem import ALL_OPS, DECODE_OPS, SELECT_OPS, Problem
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

def module(target, *, op, group, schedule=None, **options):
    problem = Problem(op=op, num_heads=group, num_kv_heads=1, top_k=16,
                      **{"seq_len": 4096, "head_dim": 128, "dtype": "bfloat16", **options})
    schedule = Schedule.parse(schedule) if schedule else default_schedule(problem, target)
    return compile_kernel(emit(problem, schedule, target)).module

def altered(module, signature):
    return SimpleNamespace(LAUNCHES=[{**x, "signature": {**x["signature"], **signature}} for x in module.LAUNCHES])

def failure(module, target):
    try:
        compile_launches(module, target)
    except (CompileError, OutOfResources) as error:
        return [type(error).__name__, str(error)]

result = {"rows": [], "sass": []}
pairs, all_schedules, gathering, exhaustive = map(json.loads, sys.argv[1:])
for place, (arch, group) in enumerate(pairs):
    target = Target.parse(arch)
    # Few tokens make the token dataflow the default; determinism, slots or two passes.
    ways = itertools.product(("hsa_forward", "hsa_backward"), ({}, {"deterministic": True}, {"seq_len": 8}))
    for turn, (op, options) in enumerate(ways):
        if not exhaustive and turn % 3 != (0, 1, 2, 1)[place]:
            continue
        for kernel in compile_launches(module(target, op=op, group=group, **options), target):
            row = asdict(kernel)
            result["texts"] = sorted(row.pop("asm"))
            result["rows"].append({"arch": arch, "group": group, **row})

hopper, cdna = Target.parse("sm_90"), Target.parse("gfx942")
variants = ({"packed": True, "mask_last_token": True}, {"per_head_weights": True}, {})
for op, schedules in all_schedules.items():
    for number, schedule in enumerate(schedules if exhaustive else schedules[::2]):
        for options in variants if exhaustive else [variants[number % len(variants)]]:
            compile_launches(module(hopper, op=op, group=3, head_dim=20, schedule=schedule, **options), hopper)
for op, schedules in gathering.items():
    for group in (16, 4) if exhaustive else (16,):
        for schedule in [None, *schedules] if exhaustive else [None]:
            schedule = schedule and schedule.format(64 // group)
            for kernel in compile_launches(module(hopper, op=op, group=group, schedule=schedule), hopper, sass=True):
                if "HGMMA" in kernel.asm["sass"]:
                    result["sass"].append([f"{kernel.name} G{group} {schedule}", kernel.asm["sass"]])
wide = module(hopper, op="hsa_backward", group=1, head_dim=256, chunk_size=128)
result["too large"] = failure(wide, cdna)
result["ill-typed"] = failure(altered(module(hopper, op="hsa_forward", group=4), {"q": "*i32"}), hopper)

# What launches would compile: on a device that is not there, nothing is, and each is noted.
class Absent:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

def note(kernel, key, signature, device, constexprs, options, attrs, warmup):
    launched.add((kernel.__name__, ASTSource(kernel, signature, constexprs, attrs).hash(), options.hash()))

def ahead(launch):
    options = make_backend(GPUTarget("cuda", 90, 32)).parse_options(
        {name: launch[name] for name in ("num_warps", "num_stages")}
    )
    return launch["kernel"].__name__, source_of(launch).hash(), options.hash()

triton.runtime.driver.set_active(Absent())
triton.JITFunction._do_compile = note
result["keys"] = []
for op in ALL_OPS:
    shape = {"num_heads": 4, "num_kv_heads": 4 if op in SELECT_OPS else 1, "head_dim": 16, "chunk_size": 16, "top_k": 2}
    problem = Problem(op=op, seq_len=8, kv_len=4096, dtype="bfloat16", **shape)
    space = SearchSpace.of(problem, hopper)
    for dataflow in space.choices:
        schedule = next(schedule for schedule in space.schedules() if schedule.dataflow == dataflow)
        kernel, launched = compile_kernel(emit(problem, schedule, hopper)), set()
        for length in range(1, 17) if op in DECODE_OPS else (*range(1, 17), 31, 64, 160, 203):
            inputs = inputs_of(replace(problem, seq_len=length, kv_len=256, batch=1 + length % 2), torch.device("cpu"))
            kernel.entry(*inputs.arguments(op), **inputs.options(op))
        compiled = {ahead(launch) for launch in kernel.module.LAUNCHES}
        result["keys"].append([f"{op} {schedule}", sorted({name for name, *_ in launched}), launched <= compiled])
print(json.dumps(result))
"""


@pytest.fixture(scope="module", params=["a group each", pytest.param("every group", marks=pytest.mark.exhaustive)])
def compiled(request: pytest.FixtureRequest) -> dict[str, Any]:
    every = request.param == "every group"
    pairs = list(itertools.product(TARGETS, GROUPS)) if every else list(zip(TARGETS, (4, 1, 16, 16), strict=True))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, *map(json.dumps, (pairs, SCHEDULES, GATHERING, every))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_all_lengths_launch_the_kernel_that_was_compiled_ahead(compiled: dict[str, Any]) -> None:
    assert len(compiled["keys"]) >= 13
    assert not [schedule for schedule, names, _ in compiled["keys"] if not names]
    assert not [schedule for schedule, _, all_known in compiled["keys"] if not all_known]


@pytest.mark.slow
def test_default_schedules_fit_use_the_matrix_units_and_do_not_spill(compiled: dict[str, Any]) -> None:
    assert {row["name"] for row in compiled["rows"]} == {
        "_hsa_forward_token", "_hsa_forward_union", "_hsa_forward_chunk", "_sum_slots",
        "_list_visits", "_sort_picks", "_sum_blocks", "_spread_picks", "_cut_tiles",
        "_hsa_backward_dq_dw", "_hsa_backward_union_dq_dw", "_hsa_backward_dk_dv", "_hsa_backward_chunk",
    }  # fmt: skip
    assert {row["arch"] for row in compiled["rows"]} == set(TARGETS)
    for row in compiled["rows"]:
        arch = row["arch"]
        assert row["matrix_instruction"] == instruction(row["name"], arch), row
        assert row["spills"] == 0, row
        assert 0 < row["registers"] <= 512, row
        assert row["shared_memory"] <= Target.parse(arch).shared_memory, row


def instruction(name: str, arch: str) -> str:
    if not name.startswith("_hsa_"):
        return "none"
    return (TOKEN_INSTRUCTION if name in ("_hsa_forward_token", "_hsa_backward_dq_dw") else CHUNK_INSTRUCTION)[arch]


@pytest.mark.slow
def test_on_hopper_the_rows_of_the_next_step_are_on_their_way_before_the_products_of_this_one(
    compiled: dict[str, Any],
) -> None:
    assert {name.split()[0] for name, _ in compiled["sass"]} >= {"_hsa_forward_union", "_hsa_backward_chunk"}
    for name, sass in compiled["sass"]:
        loop = longest_loop(sass)
        product = next(place for place, text in enumerate(loop) if "HGMMA" in text)
        copies = [place for place, text in enumerate(loop[:product]) if re.search(r"LDGSTS\S*\.128", text)]
        assert copies, name
        # A wait for all copies after the first of them would wait for the next step's, too.
        assert not any("DEPBAR.LE SB0, 0x0" in text for text in loop[copies[0] : product]), name
        assert not re.search(r"\b(LDL|STL|HMMA)\b", sass), name


def longest_loop(sass: str) -> list[str]:
    """The instructions of the longest loop of a kernel, from a label to the last branch back to it."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loop = slice(0, 0)
    for line in sass.splitlines()[1:]:
        if label := re.match(r"(LBB\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif line.strip():
            instructions.append(line)
    for place, text in enumerate(instructions):
        branch = re.search(r"BRA.*?(?:(LBB\d+)|(0x[0-9a-f]+));", text)  # to a label, or if conditional to an address
        if branch is None:
            continue
        target = labels[branch.group(1)] if branch.group(1) else int(branch.group(2), 16) // 16
        if place - target > loop.stop - loop.start:
            loop = slice(target, place + 1)
    return instructions[loop]


@pytest.mark.slow
def test_texts_of_the_compiler_come_along(compiled: dict[str, Any]) -> None:
    assert {"ttir", "ttgir", "ptx"} <= set(compiled["texts"])


@pytest.mark.slow
def test_a_kernel_that_does_not_fit_or_compile_says_so(compiled: dict[str, Any]) -> None:
    kind, message = compiled["too large"]
    assert kind == "OutOfResources"
    assert "gfx942 has 65536" in message
    kind, message = compiled["ill-typed"]
    assert kind == "CompileError"
    assert "_hsa_forward_chunk does not compile for sm_90" in message


def test_no_function_that_triton_compiles_has_an_argument_that_may_be_left_out() -> None:
    """Triton 3.7 compiles a call that leaves one out, and 3.6, which GPU machines have, does not."""
    package = Path(hsa_compile.__file__).parent
    files = [*package.rglob("templates/triton/**/*.jinja"), *package.rglob("pick_lists.py")]
    heads = [head for file in files for head in re.findall(r"@triton\.jit.*\ndef (\w+\([^)]*\))", file.read_text())]
    assert len(heads) > 30
    assert not [head for head in heads if "=" in head]


def test_an_interpreted_kernel_cannot_be_compiled() -> None:
    target = Target.parse("sm_90")
    problem = Problem(seq_len=64, num_heads=4, num_kv_heads=1, head_dim=64, top_k=2, dtype="bfloat16")
    kernel = compile_kernel(emit(problem, default_schedule(problem, target), target))
    with pytest.raises(CompileError, match="interpreter"):
        compile_launches(kernel.module, target)
