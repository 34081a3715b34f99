"""What a run asks the cache for is what `--tune` would tune."""

import pytest
import torch
from small_runs import small_run

from hsa_compile.model.training.run import run_problems

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


def test_all_stages_and_lengths_are_in_it() -> None:
    stages = [
        {"seq_len": 64, "batch_tokens": 256},
        {"min_seq_len": 64, "seq_len": 128, "batch_tokens": 256, "top_k": 2},
        {"min_seq_len": 85, "seq_len": 2000, "batch_tokens": 256, "top_k": 1},
    ]
    found = run_problems(small_run(stages=stages), torch.device("cpu"))
    forward = {(problem.batch, problem.seq_len, problem.top_k) for problem in found if problem.op == "hsa_forward"}
    # Keys round up to powers of two, and the longest of those that share one stands for all.
    first_two = {(4, 63, 3), (4, 63, 2), (3, 71, 2), (3, 84, 2), (2, 127, 2)}
    assert first_two < forward
    assert forward - first_two == {(3, 84, 1), (1, 211, 1), (1, 467, 1), (1, 977, 1), (1, 1999, 1)}
    ops = {"hsa_forward", "hsa_backward", "select_chunks", "select_chunks_backward"}
    assert {problem.op for problem in found} == ops


def test_where_rows_share_their_chunks_there_are_more_of_them() -> None:
    found = run_problems(
        small_run(stages=[{"seq_len": 64, "batch_tokens": 256, "in_batch_memory": True}]), torch.device("cpu")
    )
    assert {problem.kv_len for problem in found} == {4 * (63 // 8) * 8}


@pytest.mark.parametrize(("way", "batch", "seq_len", "heads"), [("gather", 4, 16, (4, 2)), ("travel", 1, 128, (2, 1))])
def test_processes_that_share_rows_ask_for_their_part(
    way: str, batch: int, seq_len: int, heads: tuple[int, int]
) -> None:
    """Where picked chunks travel, those of two kv heads and four rows stand in one list."""
    stages = [{"seq_len": 64, "batch_tokens": 256}]
    run = small_run(stages=stages, context_parallel=4, chunk_exchange=way)
    found = run_problems(run, torch.device("cpu"), world_size=4)
    for problem in found:
        of_attention = problem.op.startswith("hsa")
        assert (problem.batch, problem.seq_len) == ((batch, seq_len) if of_attention else (4, 16))
        assert problem.kv_len == (4 * 2 * 7 * 8 if of_attention and way == "travel" else 7 * 8)
        if of_attention:
            assert (problem.num_heads, problem.num_kv_heads) == heads


def test_a_baseline_asks_for_nothing() -> None:
    assert run_problems(small_run(model={"variant": "swa"}), torch.device("cpu")) == []


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_kernels_are_asked_for_in_the_dtype_that_they_run_in(device: str, dtype: str) -> None:
    found = run_problems(small_run(precision="bfloat16"), torch.device(device))
    assert {problem.dtype for problem in found} == {dtype}
