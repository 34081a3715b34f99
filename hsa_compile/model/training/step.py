"""One optimizer step: the learning rate, the loss, the precision, and the moving of weights and balancing biases."""

import math
import random
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn

from hsa_compile.errors import TrainingError
from hsa_compile.model.layers.basic import traced
from hsa_compile.model.layers.hs_attention import Selection
from hsa_compile.model.training.config import TrainConfig
from hsa_compile.model.training.feed import StepBatch
from hsa_compile.model.training.optimizer import clip_gradients, update_routers
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.transformer import HSATransformer
from hsa_compile.target import cpu_multiplies_bfloat16


def weighted_cross_entropy(
    hidden: Tensor, output_weight: Tensor, targets: Tensor, weights: Tensor, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """Returns Σ weights · cross entropy, with the gradients made in the forward pass, chunk by chunk.

    At no time do logits of more than `chunk` tokens exist, and they are computed once: memory beyond inputs and their
    gradients is 2 · chunk · V.

    Args:
        hidden: `[N, dim]`, the output of the last layer.
        output_weight: `[V, dim]`.
        targets: `[N]` int64, the tokens to predict.
        weights: `[N]` float32, not differentiated.
        chunk: how many tokens are computed at a time.

    Returns:
        the sum, a float32 scalar at least, differentiable in hidden and output_weight; and the cross entropy of each
        token `[N]` without gradient.
    """
    total, losses = _WeightedCrossEntropy.apply(hidden, output_weight, targets, weights, chunk)
    return total, losses


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, output_weight: Tensor, targets: Tensor, weights: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(output_weight, dtype=dtype) if needs_weight else None
        for part in _parts(hidden.shape[0], chunk):
            h = hidden[part]
            logits = (h @ output_weight.T).to(dtype)
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
            picked = targets[part, None]
            losses[part] = (normalizer - logits.gather(1, picked)).squeeze(1)
            if hidden_grad is None and weight_grad is None:
                continue
            scale = weights[part, None].to(dtype)
            grad = logits.sub_(normalizer).exp_().mul_(scale)
            grad.scatter_add_(1, picked, -scale)
            grad = grad.to(h.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = (grad @ output_weight.to(h.dtype)).to(h.dtype)
            if weight_grad is not None:
                weight_grad += (grad.T @ h).to(dtype)
        grads = [grad for grad in (hidden_grad, weight_grad) if grad is not None]
        ctx.save_for_backward(*grads)
        ctx.weight_dtype = output_weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        saved = list(ctx.saved_tensors)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = saved.pop(0) if needs_hidden else None
        weight_grad = saved.pop(0) if needs_weight else None
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if weight_grad is None else (weight_grad * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(begin, begin + chunk) for begin in range(0, length, chunk)]


class LossModel(nn.Module):
    """The model with its loss in one forward call, as FSDP and `torch.compile` want it.

    Args:
        model: the model that is trained.
        loss_chunk: how many tokens have logits at a time.
        retrieval_loss: what the losses of selections count.
    """

    def __init__(self, model: HSATransformer, loss_chunk: int, retrieval_loss: float = 0.0) -> None:
        super().__init__()
        self.model, self.loss_chunk, self.retrieval_loss = model, loss_chunk, retrieval_loss

    def forward(
        self,
        tokens: Tensor,
        weights: Tensor,
        noise_seed: int | None,
        selections: list[Selection] | None = None,
        in_batch_memory: bool = False,
        sources: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the weighted sum of the cross entropy over all predictions, and of the retrieval loss.

        Args:
            tokens: `[B, T]` int64.
            weights: `[B, T]`, what the prediction of each token counts; the first token is not predicted.
            noise_seed: the seed of the selection noise, which training adds if the model's config asks for it.
            selections: a list that is filled with what each retrieval chose.
            in_batch_memory: whether each row also sees the chunks of all others.
            sources: `[B, T]`, the place that each token is copied from, −1 for none; None for no retrieval loss.

        Returns:
            the sum, and the cross entropy of the predictions, `[B, T − 1]`. Where processes share the rows, it is the
            sum over this process's part, and the cross entropy is 0 outside of it.
        """
        config = self.model.config
        if not (self.training and config.selection_noise and config.has_memory):
            noise_seed = None
        if sources is not None:
            selections, sources = [] if selections is None else selections, sources[:, 1:]
        hidden = self.model.hidden(
            tokens[:, :-1],
            noise_seed=noise_seed,
            selections=selections,
            in_batch_memory=in_batch_memory,
            sources=sources,
        )
        own = self.model.own_text(tokens.shape[1] - 1)
        output = self.model.embedding if self.model.output is None else self.model.output
        with traced("output and loss"):
            total, losses = weighted_cross_entropy(
                hidden.flatten(0, 1),
                output.weight,
                tokens[:, 1:][:, own].flatten(),
                weights[:, 1:][:, own].flatten(),
                chunk=self.loss_chunk,
            )
        losses = losses.view(tokens.shape[0], -1)
        for selection in selections or ():
            if selection.losses is not None:
                total = total + self.retrieval_loss * (selection.losses * weights[:, 1:][:, own]).sum()
        return total, F.pad(losses, (own.start, tokens.shape[1] - 1 - own.stop))

    def predict(self, tokens: Tensor, last: int, selections: list[Selection] | None = None) -> Tensor:
        """Returns the most likely token at each of the last places, given what is before it.

        Args:
            tokens: `[B, T]` int64.
            last: how many places there are.
            selections: a list that is filled with what each retrieval chose.

        Returns:
            `[B, last]` int64.
        """
        length = tokens.shape[1] - 1
        hidden = self.model.hidden(tokens[:, :-1], selections=selections)
        own = self.model.own_text(length)
        first = max(own.start, length - last)
        predicted = self.model.logits(hidden[:, max(0, first - own.start) :]).argmax(dim=-1)
        shared = self.model.shared_rows(length)
        if shared is None:
            return predicted
        for number, chosen in enumerate(selections or ()):
            assert selections is not None
            selections[number] = Selection(indices=shared.gather(chosen.indices), weights=shared.gather(chosen.weights))
        found = predicted.new_zeros(tokens.shape[0], length)
        found[:, first : own.stop] = predicted[:, : max(0, own.stop - first)]
        torch.distributed.all_reduce(found, group=shared.mesh.get_group())
        return found[:, length - last :]


def compiled(loss_model: LossModel) -> Any:
    """Passes the model through `torch.compile`, for calls of `forward`.

    The cache of AOTAutograd stays off: PyTorch 2.13 loads views from it whose sizes are garbage.
    """
    torch._functorch.config.enable_autograd_cache = False
    return torch.compile(loss_model)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What came of a step, over all processes.

    Attributes:
        loss: the loss that was minimized.
        text_loss, answer_loss: mean cross entropy without weights; None where there was no text or no answer.
        retrieval_loss: the mean retrieval loss of answers, its sum over the retrievals; None if the loss has none.
        grad_norm: the norm of the gradient before clipping.
        lr: the learning rate of the step.
        router_load: the largest load of an expert over the mean, in the worst layer; None without MoE.
        stopping: whether some process asked for an end.
        own_times: what each process gave as its own time.
    """

    loss: float
    text_loss: float | None
    answer_loss: float | None
    retrieval_loss: float | None
    grad_norm: float
    lr: float
    router_load: float | None
    stopping: bool
    own_times: tuple[float, ...]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context in which products have the precision that a config asks for."""
    is_bfloat16 = chosen_precision(precision, device) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16) if is_bfloat16 else nullcontext()


def chosen_precision(precision: str, device: torch.device) -> str:
    """Returns `bfloat16` or `float32`: what `auto` means on the device, or the precision that was asked for."""
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" or cpu_multiplies_bfloat16() else "float32"


def normalized_weights(batch: StepBatch, processes: Processes) -> tuple[Tensor, Tensor]:
    """Returns weights that turn the sum into mean over text plus mean over answers, of all processes' rows.

    Returns:
        `[B, T]`, and the counts of text and answers, `[2]` float64.
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
    own_time: float = 0.0,
    selections: list[Selection] | None = None,
    frozen: Collection[nn.Parameter] = (),
) -> StepResult:
    """Moves the weights by one batch.

    Args:
        loss_model: `LossModel`, sharded and compiled or not.
        optimizer: the optimizer of its parameters.
        batch: this process's rows.
        config: how the run is optimized.
        processes: the processes among which this one is.
        stopping: whether this process wants to end, which all are told.
        own_time: how long this process worked by itself in the step before, which all are told.
        selections: a list that is filled with what each retrieval of the first rows chose.
        frozen: the weights that stay as they are.

    Raises:
        TrainingError: the loss or the gradient is not finite; the weights are not moved then.
    """
    step = batch.plan.step
    weights, counts = normalized_weights(batch, processes)
    lr = config.learning_rate(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    sums = _add_gradients(loss_model, batch, weights, config, processes, selections)
    sums[4] = stopping  # over all processes, how many want to stop
    sums[5 + processes.rank] = own_time
    loss_sum, text, answer, retrieval, stops, *own_times = processes.sum(sums).tolist()
    if loss_sum != loss_sum or abs(loss_sum) == float("inf"):
        raise TrainingError(
            f"the loss of step {step} is {loss_sum}; a lower train.lr than {config.lr:g} or a longer warm-up than "
            f"train.warmup_steps = {config.warmup_steps} may help; --resume goes on from the last checkpoint"
        )
    for weight in frozen:  # by dropping its gradient: FSDP2 does not follow when requires_grad changes
        weight.grad = None
    norm = clip_gradients(loss_model.parameters(), config.clip or float("inf"), processes)
    if not math.isfinite(norm):
        raise TrainingError(
            f"the norm of the gradient of step {step} is {norm}, while its loss is {loss_sum:g}; the weights are those "
            f"before the step; a lower train.lr than {config.lr:g} may help; --resume goes on from the last checkpoint"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    load = update_routers(loss_model.modules(), config, frozen)
    num_text, num_answers = counts.tolist()
    return StepResult(
        loss=loss_sum,
        text_loss=text / num_text if num_text else None,
        answer_loss=answer / num_answers if num_answers else None,
        retrieval_loss=retrieval / config.retrieval_loss if num_answers and config.retrieval_loss else None,
        grad_norm=norm,
        lr=lr,
        router_load=load,
        stopping=stops > 0,
        own_times=tuple(own_times),
    )


def _add_gradients(
    loss_model: nn.Module,
    batch: StepBatch,
    weights: Tensor,
    config: TrainConfig,
    processes: Processes,
    selections: list[Selection] | None,
) -> Tensor:
    """Adds the gradients of this process's rows, part by part.

    Returns:
        in float64: the loss, cross entropy of text and of answers, what retrieval adds to the loss, and room for more.
    """
    step, device = batch.plan.step, processes.device
    sums = torch.zeros(5 + processes.world_size, dtype=torch.float64, device=device)
    parts = min(config.accumulation, batch.plan.num_rows // processes.num_row_groups)  # as many in each process
    for number, rows in enumerate(torch.arange(batch.tokens.shape[0]).tensor_split(parts)):
        tokens, part = batch.tokens[rows].to(device), weights[rows].to(device)
        noise = random.Random(f"noise {config.seed} {step} {number} {processes.row_group}").getrandbits(62)
        sources = batch.sources if config.retrieval_loss else None
        sources = sources[rows].to(device) if sources is not None else None
        chosen = selections if number == 0 else None
        with autocast(config.precision, device):
            loss, losses = loss_model(tokens, part, noise, chosen, batch.plan.in_batch_memory, sources)
        # FSDP takes the mean over processes; the loss is already divided by the counts of all.
        (loss * processes.world_size).backward()
        part, is_answer = part[:, 1:], batch.is_answer[rows, 1:].to(device)
        sums[0] += loss.detach()
        sums[1] += losses[(part > 0) & ~is_answer].double().sum()
        sums[2] += losses[(part > 0) & is_answer].double().sum()
        sums[3] += loss.detach() - (losses * part).sum()
    return sums
