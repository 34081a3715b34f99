"""One optimizer step: rows in, weights moved, numbers out."""

import random
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from hsa_compile.errors import TrainingError
from hsa_compile.model.hs_attention import Selection
from hsa_compile.model.moe import MoE
from hsa_compile.model.training.config import TrainConfig
from hsa_compile.model.training.feed import StepBatch
from hsa_compile.model.training.loss import weighted_cross_entropy
from hsa_compile.model.training.optimizer import learning_rate
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.transformer import HSATransformer
from hsa_compile.target import cpu_multiplies_bfloat16


class LossModel(nn.Module):
    """The model with its loss: one forward call, as FSDP and `torch.compile` want it.

    Args:
        model: that is trained.
        loss_chunk: tokens whose logits exist at a time.
    """

    def __init__(self, model: HSATransformer, loss_chunk: int) -> None:
        super().__init__()
        self.model, self.loss_chunk = model, loss_chunk

    def forward(
        self,
        tokens: Tensor,
        weights: Tensor,
        noise_seed: int | None,
        selections: list[Selection] | None = None,
        in_batch_memory: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the cross entropy over all predictions.

        Args:
            tokens: `[B, T]` int64.
            weights: `[B, T]`, of the prediction of each token; the first is not predicted.
            noise_seed: of the selection noise, which there is in training if the model's config asks for it.
            selections: filled with what each retrieval chose.
            in_batch_memory: whether each row also sees the chunks of all others.

        Returns:
            the sum; the cross entropy of the predictions, `[B, T − 1]`.
        """
        config = self.model.config
        if not (self.training and config.selection_noise and config.has_memory):
            noise_seed = None
        hidden = self.model.hidden(
            tokens[:, :-1], noise_seed=noise_seed, selections=selections, in_batch_memory=in_batch_memory
        )
        output = self.model.embedding if self.model.output is None else self.model.output
        total, losses = weighted_cross_entropy(
            hidden.flatten(0, 1),
            output.weight,
            tokens[:, 1:].flatten(),
            weights[:, 1:].flatten(),
            chunk=self.loss_chunk,
        )
        return total, losses.view(tokens.shape[0], -1)

    def predict(self, tokens: Tensor, last: int, selections: list[Selection] | None = None) -> Tensor:
        """The most likely token at each of the last places, given what is before it.

        Args:
            tokens: `[B, T]` int64.
            last: how many places.
            selections: filled with what each retrieval chose.

        Returns:
            `[B, last]` int64.
        """
        hidden = self.model.hidden(tokens[:, :-1], selections=selections)
        return self.model.logits(hidden[:, hidden.shape[1] - last :]).argmax(dim=-1)


def compiled(loss_model: LossModel) -> Any:
    """The model through `torch.compile`, for calls of `forward`.

    Without the cache of AOTAutograd: PyTorch 2.13 loads views from it whose sizes are garbage.
    """
    torch._functorch.config.enable_autograd_cache = False
    return torch.compile(loss_model)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What came of a step, over all processes.

    Attributes:
        loss: that was minimized.
        text_loss, answer_loss: mean cross entropy, unweighted; None where there was none.
        grad_norm: before clipping.
        lr: of the step.
        router_load: largest load of an expert over the mean, the worst layer's; None without MoE.
        stopping: whether a process asked for an end.
    """

    loss: float
    text_loss: float | None
    answer_loss: float | None
    grad_norm: float
    lr: float
    router_load: float | None
    stopping: bool


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of products that a config asks for."""
    is_bfloat16 = chosen_precision(precision, device) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16) if is_bfloat16 else nullcontext()


def chosen_precision(precision: str, device: torch.device) -> str:
    """`bfloat16` or `float32`: what `auto` means on the device; another precision is that which it is."""
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" or cpu_multiplies_bfloat16() else "float32"


def normalized_weights(batch: StepBatch, processes: Processes) -> tuple[Tensor, Tensor]:
    """Weights by which the sum becomes mean over text plus mean over answers, of all processes' rows.

    Returns:
        `[B, T]`; and the counts of text and answers `[2]` float64.
    """
    counted = batch.weights > 0
    is_text = counted & ~batch.is_answer
    is_answer = counted & batch.is_answer
    counts = torch.stack((is_text.sum(), is_answer.sum())).double()
    counts = processes.sum(counts.to(processes.device)).cpu()
    scale = (1 / counts.clamp_min(1)).float()
    return batch.weights * torch.where(is_answer, scale[1], scale[0]), counts


def run_step(
    loss_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: StepBatch,
    config: TrainConfig,
    processes: Processes,
    *,
    stopping: bool = False,
    selections: list[Selection] | None = None,
) -> StepResult:
    """Moves the weights by one batch.

    Args:
        loss_model: `LossModel`, sharded and compiled or not.
        optimizer: of its parameters.
        batch: this process's rows.
        config: of the run.
        processes: among which this one is.
        stopping: whether this process wants to end; told to all.
        selections: filled with what each retrieval of the first rows chose.

    Raises:
        TrainingError: the loss is not a number.
    """
    step, device = batch.plan.step, processes.device
    weights, counts = normalized_weights(batch, processes)
    lr = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # loss, cross entropy of text and of answers, processes that want to stop
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    sums[3] = stopping
    parts = min(config.accumulation, batch.plan.num_rows // processes.world_size)  # as many in each process
    for number, rows in enumerate(torch.arange(batch.tokens.shape[0]).tensor_split(parts)):
        tokens, part = batch.tokens[rows].to(device), weights[rows].to(device)
        noise = random.Random(f"noise {config.seed} {step} {number} {processes.rank}").getrandbits(62)
        with autocast(config.precision, device):
            loss, losses = loss_model(
                tokens, part, noise, selections if number == 0 else None, batch.plan.in_batch_memory
            )
        # FSDP takes the mean over processes; the loss is already divided by the counts of all.
        (loss * processes.world_size).backward()
        is_answer = (batch.is_answer[rows, 1:]).to(device)
        sums[0] += loss.detach()
        sums[1] += losses[(part[:, 1:] > 0) & ~is_answer].double().sum()
        sums[2] += losses[(part[:, 1:] > 0) & is_answer].double().sum()
    loss_sum, text, answer, stops = processes.sum(sums).tolist()
    if loss_sum != loss_sum or abs(loss_sum) == float("inf"):
        raise TrainingError(
            f"the loss of step {step} is {loss_sum}; a lower train.lr than {config.lr:g} or a longer warm-up than "
            f"train.warmup_steps = {config.warmup_steps} may help; --resume goes on from the last checkpoint"
        )
    norm = nn.utils.clip_grad_norm_(loss_model.parameters(), config.clip or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    load = update_routers(loss_model.modules(), config)
    num_text, num_answers = counts.tolist()
    return StepResult(
        loss=loss_sum,
        text_loss=text / num_text if num_text else None,
        answer_loss=answer / num_answers if num_answers else None,
        grad_norm=float(_whole(norm)),
        lr=lr,
        router_load=load,
        stopping=stops > 0,
    )


def update_routers(modules: Iterable[nn.Module], config: TrainConfig) -> float | None:
    """Moves the balancing biases; returns the largest load over the mean, of the worst layer on this process."""
    loads = []
    for module in modules:
        if isinstance(module, MoE):
            loads.append(module.max_over_mean_load)
            module.update_bias(config.bias_update_rate)
    return max(loads, default=None)


def _whole(norm: Tensor) -> Tensor:
    """A norm over shards as a plain number."""
    return norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm
