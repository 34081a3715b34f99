"""Four processes that share rows, experts or both: the same outputs and gradients as one, in float64."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import build, small_config
from torch.distributed.device_mesh import init_device_mesh

from hsa_compile.model.config import VARIANTS
from hsa_compile.model.transformer import HSATransformer

PROCESSES = 4
# The last but one has rows that no part divides, the last one chunk a process.
LENGTHS = (60, 43, 17)


def in_processes(task: Callable[[], None], tmp_path: Path, count: int = PROCESSES) -> None:
    """Calls a function in each of several processes that form a group."""
    torch.multiprocessing.spawn(_join_and_call, args=(task, str(tmp_path / "rendezvous"), count), nprocs=count)


def _join_and_call(rank: int, task: Callable[[], None], rendezvous: str, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    task()
    dist.destroy_process_group()


def gradients(
    model: HSATransformer, tokens: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The model's output at this process's part of the rows, and the gradient of a function of it."""
    model.zero_grad()
    hidden = model.hidden(tokens, **options)
    own = model.own_text(tokens.shape[1])
    factors = torch.randn(
        *tokens.shape, hidden.shape[2], dtype=hidden.dtype, generator=torch.Generator().manual_seed(1)
    )
    (hidden * factors[:, own]).sum().backward()
    found = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in model.named_parameters()
    }
    return hidden.detach(), found


def _share_rows(variant: str) -> None:
    whole = build(small_config(variant, selection_noise=True), torch.float64)
    shared = copy.deepcopy(whole)
    shared.context_mesh = init_device_mesh("cpu", (PROCESSES,))
    for length in LENGTHS:
        for options in ({}, {"in_batch_memory": True}, {"noise_seed": 3}):
            tokens = torch.randint(19, (2, length), generator=torch.Generator().manual_seed(length))
            expected, expected_gradients = gradients(whole, tokens, **options)
            hidden, found = gradients(shared, tokens, **options)
            torch.testing.assert_close(hidden, expected[:, shared.own_text(length)])
            for name, gradient in found.items():
                dist.all_reduce(gradient)
                torch.testing.assert_close(
                    gradient, expected_gradients[name], msg=lambda text, name=name: f"{name}: {text}"
                )


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "full"])
def test_shared_rows_equal_whole_ones(variant: str, tmp_path: Path) -> None:
    in_processes(functools.partial(_share_rows, variant), tmp_path)
