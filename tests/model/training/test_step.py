"""One step: what is minimized, and that it does not depend on how its rows are computed."""

from dataclasses import replace

import pytest
import torch
from small_runs import small_run

from hsa_compile.errors import TrainingError
from hsa_compile.model.layers.hs_attention import Selection
from hsa_compile.model.training import step as step_module
from hsa_compile.model.training.config import RunConfig
from hsa_compile.model.training.feed import StepBatch, StepPlan
from hsa_compile.model.training.optimizer import make_optimizer
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.training.step import (
    LossModel,
    StepResult,
    autocast,
    chosen_precision,
    compiled,
    normalized_weights,
    run_step,
)
from hsa_compile.model.transformer import HSATransformer

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
NO_NOISE = {"selection_noise": False}


def batch(rows: int = 4, length: int = 40, step: int = 5) -> StepBatch:
    generator = torch.Generator().manual_seed(1)
    is_answer = torch.zeros(rows, length, dtype=torch.bool)
    is_answer[:-1, -4:] = True  # the last row has none
    weights = torch.full((rows, length), 0.2).masked_fill(is_answer, 1.0)
    weights[:, 0] = 0
    return StepBatch(
        plan=StepPlan(step=step, stage=0, length=length, num_rows=rows),
        tokens=torch.randint(256, (rows, length), generator=generator),
        weights=weights,
        is_answer=is_answer,
    )


def after_step(
    run: RunConfig, alone: Processes, *, checkpoint: bool = False, step: int = 5
) -> tuple[LossModel, StepResult]:
    torch.manual_seed(0)
    model = HSATransformer(run.model).train()
    model.checkpoint_activations = checkpoint
    loss_model = LossModel(model, run.train.loss_chunk)
    result = run_step(loss_model, make_optimizer(model, run.train), batch(step=step), run.train, alone)
    return loss_model, result


def test_the_loss_is_the_mean_over_text_and_the_mean_over_answers(alone: Processes) -> None:
    run = small_run(model=NO_NOISE)
    _, result = after_step(run, alone)
    rows = batch()
    torch.manual_seed(0)
    model = HSATransformer(run.model)
    losses = torch.nn.functional.cross_entropy(
        model(rows.tokens[:, :-1]).flatten(0, 1), rows.tokens[:, 1:].flatten(), reduction="none"
    ).view(4, -1)
    text, answers = losses[~rows.is_answer[:, 1:]].mean().item(), losses[rows.is_answer[:, 1:]].mean().item()
    assert result.text_loss == pytest.approx(text, rel=1e-5)
    assert result.answer_loss == pytest.approx(answers, rel=1e-5)
    assert result.loss == pytest.approx(0.2 * text + answers, rel=1e-5)


@pytest.mark.parametrize("variant", ["hsa-ultralong", "ramba", "drt"])
def test_the_retrieval_loss_is_a_mean_over_answers(variant: str, alone: Processes) -> None:
    rows = batch()
    sources = torch.full_like(rows.tokens, -1)
    sources[0, -4:-2], sources[1, -3] = torch.tensor([9, 10]), 3
    found = []
    for count in (0.0, 1.0, 3.0):
        run = small_run(model={**NO_NOISE, "variant": variant}, retrieval_loss=count)
        torch.manual_seed(0)
        loss_model = LossModel(HSATransformer(run.model).train(), run.train.loss_chunk, count)
        result = run_step(
            loss_model, make_optimizer(loss_model, run.train), replace(rows, sources=sources), run.train, alone
        )
        found.append(result.loss)
    plain, once, thrice = found
    if variant == "drt":  # its tokens do not choose
        assert plain == once
        return
    torch.manual_seed(0)
    selections: list[Selection] = []
    HSATransformer(run.model).hidden(rows.tokens[:, :-1], sources=sources[:, 1:], selections=selections)
    told = sum(chosen.losses.sum().item() for chosen in selections if chosen.losses is not None)
    assert told > 0
    assert result.retrieval_loss == pytest.approx(told / 12, rel=1e-4)
    assert once - plain == pytest.approx(told / 12, rel=1e-4)  # 12 bytes are answers, 3 of which have a source
    assert thrice - plain == pytest.approx(3 * told / 12, rel=1e-4)


def test_without_answers_there_is_text_alone(alone: Processes) -> None:
    rows = batch()
    rows.is_answer[:] = False
    rows.weights[:] = 1
    weights, counts = normalized_weights(rows, alone)
    assert counts.tolist() == [4 * 40, 0]
    assert weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("changes", [{"accumulation": 2}, {"accumulation": 9}, {"loss_chunk": 7}])
def test_parts_make_the_same_step(changes: dict[str, int], alone: Processes) -> None:
    whole, expected = after_step(small_run(model=NO_NOISE), alone)
    parts, result = after_step(small_run(model=NO_NOISE, **changes), alone)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_activation_checkpointing_makes_the_same_step_bit_for_bit(alone: Processes) -> None:
    plain, expected = after_step(small_run(), alone)
    again, result = after_step(small_run(), alone, checkpoint=True)
    assert result == expected
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_noise_depends_on_the_step_and_the_seed(alone: Processes) -> None:
    def loss(run: RunConfig, step: int = 5) -> float:
        return after_step(run, alone, step=step)[1].loss

    assert loss(small_run()) == loss(small_run())
    assert len({loss(small_run()), loss(small_run(), step=6), loss(small_run(seed=1))}) == 3
    assert loss(small_run(model=NO_NOISE)) == loss(small_run(model=NO_NOISE, seed=1), step=6)


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_the_gradient_is_clipped_to_its_norm(clip: float, alone: Processes) -> None:
    run = small_run(model=NO_NOISE, clip=clip)
    torch.manual_seed(0)
    loss_model = LossModel(HSATransformer(run.model).train(), run.train.loss_chunk)
    before = [weight.detach().clone() for weight in loss_model.parameters()]
    result = run_step(loss_model, torch.optim.SGD(loss_model.parameters()), batch(), run.train, alone)
    moved = torch.cat([(a - b).flatten() for a, b in zip(loss_model.parameters(), before, strict=True)]).norm().item()
    assert result.grad_norm > 0.02
    assert moved == pytest.approx(result.lr * (clip or result.grad_norm), rel=1e-2)


def test_balancing_biases_move_by_the_configured_rate(alone: Processes) -> None:
    loss_model, result = after_step(small_run(bias_update_rate=0.25), alone)
    biases = [buffer for name, buffer in loss_model.named_buffers() if name.endswith("balance_bias")]
    assert biases
    assert all(bias.abs().max() == 0.25 for bias in biases)
    assert result.router_load is not None
    assert result.router_load >= 1


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_moves_weights(alone: Processes) -> None:
    run = small_run()
    model = HSATransformer(run.model).train()
    model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = model.embedding.weight.detach().clone()
    with pytest.raises(TrainingError, match=r"the norm of the gradient of step 5 is (nan|inf)"):
        run_step(LossModel(model, 100), make_optimizer(model, run.train), batch(), run.train, alone)
    assert torch.equal(model.embedding.weight, before)


def test_a_loss_that_is_no_number_ends_the_run_before_it_moves_weights(alone: Processes) -> None:
    run = small_run()
    model = HSATransformer(run.model).train()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    before = model.embedding.weight.detach().clone()
    with pytest.raises(TrainingError, match=r"the loss of step 5 is nan; a lower train.lr than 0.001"):
        run_step(LossModel(model, 100), make_optimizer(model, run.train), batch(), run.train, alone)
    assert torch.equal(model.embedding.weight, before)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the tracer's own
def test_a_compiled_model_makes_the_same_step(alone: Processes) -> None:
    run = small_run(model=NO_NOISE)
    _, expected = after_step(run, alone)
    torch.manual_seed(0)
    model = HSATransformer(run.model).train()
    loss_model = LossModel(model, run.train.loss_chunk)
    result = run_step(compiled(loss_model), make_optimizer(model, run.train), batch(), run.train, alone)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)


@pytest.mark.parametrize(
    ("precision", "device", "has_units", "chosen"),
    [
        ("auto", "cuda", False, "bfloat16"),
        ("auto", "cpu", True, "bfloat16"),
        ("auto", "cpu", False, "float32"),
        ("bfloat16", "cpu", False, "bfloat16"),
        ("float32", "cuda", True, "float32"),
    ],
)
def test_auto_is_the_precision_that_the_device_has_units_for(
    precision: str, device: str, has_units: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "cpu_multiplies_bfloat16", lambda: has_units)
    assert chosen_precision(precision, torch.device(device)) == chosen
    if device == "cpu":
        with autocast(precision, torch.device(device)):
            assert str((torch.ones(2, 2) @ torch.ones(2, 2)).dtype) == f"torch.{chosen}"
