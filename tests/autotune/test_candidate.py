from collections.abc import Callable

import pytest
import torch

from hsa_compile.autotune.bench.bench import LocalBench, prepare
from hsa_compile.errors import CompileError, CompilerCrashed, InvalidSchedule, OutOfMemory, OutOfResources, WrongResult
from hsa_compile.kernels.hsa_attention.inputs import make_inputs
from hsa_compile.kernels.hsa_attention.reference import hsa_attention_reference
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import NAMED_TARGETS, Target

PROBLEM = Problem(seq_len=67, num_heads=4, num_kv_heads=2, head_dim=8, chunk_size=16, top_k=2)
INPUTS = make_inputs(PROBLEM, torch.device("cpu"))
TOKEN = Schedule.of("token", block_tokens=4)


def failing(error: Exception) -> Callable[..., None]:
    def check(*_: object, **__: object) -> None:
        raise error

    return check


def test_a_prepared_candidate_runs_the_kernel_of_its_schedule_on_the_inputs() -> None:
    candidate = prepare(PROBLEM, TOKEN, Target.parse("cpu"), INPUTS)
    assert candidate.schedule == TOKEN
    assert len(candidate.fingerprint) == 16
    expected = hsa_attention_reference(*INPUTS.arguments("hsa_forward"), chunk_size=16)  # type: ignore[arg-type]
    torch.testing.assert_close(candidate.call(), expected, rtol=1e-5, atol=1e-5)


def test_an_invalid_schedule_is_refused_before_anything_is_compiled() -> None:
    with pytest.raises(InvalidSchedule, match="block_tokens = 3"):
        prepare(PROBLEM, Schedule.of("token", block_tokens=3), Target.parse("cpu"), INPUTS)


def test_a_wrong_result_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsa_compile.autotune.bench.bench.check", failing(WrongResult("o is off")))
    with pytest.raises(WrongResult, match="o is off"):
        prepare(PROBLEM, TOKEN, Target.parse("cpu"), INPUTS)


def test_too_little_memory_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsa_compile.autotune.bench.bench.check", failing(torch.OutOfMemoryError("20 GiB")))
    with pytest.raises(OutOfMemory, match="not enough memory: 20 GiB"):
        prepare(PROBLEM, TOKEN, Target.parse("cpu"), INPUTS)


def test_an_error_without_a_name_here_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsa_compile.autotune.bench.bench.check", failing(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        prepare(PROBLEM, TOKEN, Target.parse("cpu"), INPUTS)


def test_tritons_errors_of_a_first_launch_get_names_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton.runtime.errors import OutOfResources as TritonOutOfResources
    from triton.runtime.errors import PTXASError

    target = NAMED_TARGETS["sm_90"]
    token = Schedule.of("token", num_warps=4, num_stages=2)
    translations = (
        (TritonOutOfResources(300000, 232448, "shared memory"), OutOfResources),
        (PTXASError("ptxas died"), CompileError),
        (PTXASError("ptxas fatal: No space left on device"), CompilerCrashed),
        (RuntimeError("Triton Error [CUDA]: out of memory"), OutOfMemory),
        (RuntimeError("Triton Error [HIP]:  Code: 2, Messsage: out of memory"), OutOfMemory),
        (RuntimeError("Triton Error [CUDA]: too many resources requested for launch"), OutOfResources),
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), OutOfMemory),
        (RuntimeError("CUDA driver error: out of memory"), OutOfMemory),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), RuntimeError),
        (RuntimeError("CUDA error: unspecified launch failure"), RuntimeError),
        (ZeroDivisionError("a bug"), ZeroDivisionError),
    )
    for error, expected in translations:
        monkeypatch.setattr("hsa_compile.autotune.bench.bench.check", failing(error))
        with pytest.raises(expected) as raised:
            prepare(PROBLEM, token, target, INPUTS)
        assert type(raised.value) is expected


def test_an_error_while_a_candidate_is_timed_gets_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = LocalBench(PROBLEM, Target.parse("cpu"), "cpu")
    bench.prepare(TOKEN)
    monkeypatch.setattr("hsa_compile.autotune.bench.bench.measure", failing(torch.OutOfMemoryError("256 MiB")))
    with pytest.raises(OutOfMemory, match="not enough memory: 256 MiB"):
        bench.time([TOKEN], 1)
