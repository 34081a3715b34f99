"""The optimizers, the clipping of gradients before a step, and the balancing of experts after it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hsa_compile.model.layers.moe import MoE
from hsa_compile.model.training.config import MUON, TrainConfig
from hsa_compile.model.training.processes import Processes

_AT_THE_EDGE = ("router", "output")


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some weights and AdamW for the others, as one optimizer: one list of groups, and one state.

    Args:
        muon: moves matrices; each step of it has all singular values near one, so that it moves rare directions too.
        adamw: moves the other weights.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._parts = (muon, adamw)
        muon.state = adamw.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves all weights that have a gradient."""
        assert closure is None, "the loss is computed once"
        for part in self._parts:
            part.step()


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Makes AdamW (arXiv 1711.05101), or Muon with it (2502.16982); matrices decay, norms and biases do not.

    Muon moves the weights of linear layers; the router and the output layer are left to AdamW, as embeddings are.
    """
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    hidden = _hidden_matrices(model) if config.optimizer == MUON else set()
    groups = [
        {"params": same, "weight_decay": config.weight_decay if is_matrix else 0.0}
        for is_matrix in (True, False)
        for same in _by_mesh([w for w in parameters if (w.dim() >= 2) == is_matrix and w not in hidden])
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    if not hidden:
        return adamw
    matrices = [weight for weight in parameters if weight in hidden]
    decay = config.weight_decay
    muon = torch.optim.Muon(matrices, lr=config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(muon, adamw)


def _hidden_matrices(model: nn.Module) -> set[Tensor]:
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {module.weight for name, module in linear if name.split(".")[-1] not in _AT_THE_EDGE}


def _by_mesh(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Groups weights by the processes that they are spread over; one kernel cannot update weights of several groups."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for weight in weights:
        groups.setdefault(weight.device_mesh if isinstance(weight, DTensor) else None, []).append(weight)
    return list(groups.values())


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, processes: Processes) -> float:
    """Scales all gradients so that the norm of all together is at most `largest`; returns the norm before that.

    Each process has a part of each gradient, and no part is with two, however the weights are spread.
    """
    groups = _by_mesh([weight for weight in parameters if weight.grad is not None])
    grads = [weight.grad for group in groups for weight in group if weight.grad is not None]
    norm = nn.utils.get_total_norm([grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads])
    if processes.world_size > 1:
        norm = processes.sum(norm.square()).sqrt()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, largest, norm)
    return float(norm)


def update_routers(
    modules: Iterable[nn.Module], config: TrainConfig, frozen: Iterable[nn.Parameter] = ()
) -> float | None:
    """Moves the balancing biases; returns the largest load over the mean, of the worst layer on this process.

    Args:
        modules: all modules of the model.
        config: says by how much.
        frozen: the weights that stay as they are, and with them the bias of a layer whose router is among them.
    """
    loads, still = [], {id(weight) for weight in frozen}
    for module in modules:
        if isinstance(module, MoE):
            loads.append(module.max_over_mean_load)
            module.update_bias(0.0 if id(module.router.weight) in still else config.bias_update_rate)
    return max(loads, default=None)
