"""What autocast means for the parts that do not leave their precision to it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products inside run in the dtype of their tensors; the meta device knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would multiply `x` in, or that of `x` where autocast is off."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
