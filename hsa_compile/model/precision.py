"""What autocast means for the parts that do not leave their precision to it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products inside run in the dtype of their tensors."""
    return torch.autocast(device.type, enabled=False) if _is_on(device) else nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would multiply `x` in, or that of `x` where autocast is off."""
    return torch.get_autocast_dtype(x.device.type) if _is_on(x.device) else x.dtype


def without_cpu_autocast(*tensors: Tensor) -> tuple[AbstractContextManager[Any], tuple[Tensor, ...]]:
    """For kernels that are for float32 on a CPU: under autocast there, a context without it and float32 tensors."""
    device = tensors[0].device
    if device.type == "cpu" and _is_on(device):
        return no_autocast(device), tuple(x.float() for x in tensors)
    return nullcontext(), tensors


def _is_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # the meta device knows no autocast
