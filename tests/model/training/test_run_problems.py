"""What a run asks the cache for is what `--tune` would tune."""

import pytest
import torch
from small_runs import small_run

from hsa_compile.model.training.problems import run_problems

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


def test_all_stages_and_lengths_are_in_it() -> None:
    stages = [
        {"seq_len": 64, "batch_tokens": 256},
        {"min_seq_len": 64, "seq_len": 128, "batch_tokens": 256, "top_k": 2},
    ]
    found = run_problems(small_run(stages=stages), torch.device("cpu"))
    forward = {(problem.batch, problem.seq_len, problem.top_k) for problem in found if problem.op == "hsa_forward"}
    # Keys round up to powers of two; of rows of 64 the second stage has one length in 65, which is rare.
    assert forward == {(4, 63, 3), (3, 71, 2), (3, 84, 2), (2, 127, 2)}
    ops = {"hsa_forward", "hsa_backward", "select_chunks", "select_chunks_backward"}
    assert {problem.op for problem in found} == ops


def test_a_baseline_asks_for_nothing() -> None:
    assert run_problems(small_run(model={"variant": "swa"}), torch.device("cpu")) == []


def test_bfloat16_is_asked_for_where_products_are() -> None:
    found = run_problems(small_run(precision="bfloat16"), torch.device("cpu"))
    assert {problem.dtype for problem in found} == {"bfloat16"}
