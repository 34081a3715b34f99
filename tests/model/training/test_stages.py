"""Steps belong to stages, rows to steps, and layers do as the stage says."""

import pytest
import torch
from small_runs import small_run

from hsa_compile.model.layers.hs_attention import Retrieval
from hsa_compile.model.layers.window_attention import WindowAttention
from hsa_compile.model.training.config import Stage
from hsa_compile.model.training.feed import NUM_LENGTHS, apply_stage, lengths, plan_step, stage_at
from hsa_compile.model.transformer import HSATransformer

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


def test_stages_share_the_steps() -> None:
    stages = [{"share": share, "seq_len": 64, "batch_tokens": 64} for share in (1, 2, 1)]
    run = small_run(steps=8, stages=stages)
    assert [stage_at(run, step) for step in range(9)] == [0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_lengths_vary_within_the_stage_and_rows_fill_the_batch() -> None:
    run = small_run(steps=200)
    plans = [plan_step(run, step) for step in range(100)]
    assert {plan.length for plan in plans} == set(lengths(run.stages[0]))
    assert len(lengths(run.stages[0])) == NUM_LENGTHS
    assert {50, 70} < set(lengths(run.stages[0]))
    assert all(50 <= plan.length <= 70 and plan.num_rows == 300 // plan.length for plan in plans)
    assert plans == [plan_step(run, step) for step in range(100)]


@pytest.mark.parametrize(("shortest", "longest", "expected"), [(7, 7, [7]), (7, 9, [7, 8, 9]), (2, 3, [2, 3])])
def test_a_narrow_stage_has_all_lengths(shortest: int, longest: int, expected: list[int]) -> None:
    assert lengths(Stage(min_seq_len=shortest, seq_len=longest, batch_tokens=64)) == expected


def test_a_row_longer_than_the_batch_is_one_row() -> None:
    run = small_run(stages=[{"seq_len": 500, "batch_tokens": 60}])
    assert plan_step(run, 0).num_rows == 1


NARROW = {"seq_len": 64, "batch_tokens": 128, "window": 12, "top_k": 2, "selection_noise": False}


def test_window_and_top_k_of_the_stage_reach_the_layers_and_change_what_they_do() -> None:
    run = small_run(stages=[{"seq_len": 64, "batch_tokens": 128}, NARROW])
    torch.manual_seed(0)
    model = HSATransformer(run.model).eval()
    tokens = torch.randint(256, (1, 90))
    before = model(tokens)
    apply_stage(model, run.model_in(run.stages[1]))
    assert {module.window for module in model.modules() if isinstance(module, WindowAttention)} == {12}
    assert {module.top_k for module in model.modules() if isinstance(module, Retrieval)} == {2}
    assert not torch.equal(model(tokens), before)
    assert not model.config.selection_noise
    apply_stage(model, run.model)
    assert model.config.selection_noise
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)
