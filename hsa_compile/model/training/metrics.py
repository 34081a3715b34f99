"""What is recorded while a run goes on: a JSONL file that can be cut back, TensorBoard, Weights & Biases."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hsa_compile.errors import SaveError
from hsa_compile.model.layers.hs_attention import Selection
from hsa_compile.versions import require

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"

# Peaks of dense bfloat16 products, without sparsity, in TFLOP/s, from the vendors' data sheets.
_PEAKS = (
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("GH200", 989.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.0),
    ("MI250", 362.0),
)


class MetricsLog:
    """Writes the records of a run.

    Args:
        directory: the directory of the run.
        size: the length in bytes that the JSONL file is cut to; later records belong to steps that are run again.
        wandb_project: the Weights & Biases project; empty for none.

    Raises:
        SaveError: the file cannot be written; any call may raise it.
        MissingDependency: a project is named, and wandb is not installed.
    """

    def __init__(self, directory: Path, *, size: int = 0, wandb_project: str = "") -> None:
        self._path = directory / METRICS_FILE
        self._board = _tensorboard(directory)
        self._wandb = _wandb(directory, wandb_project) if wandb_project else None
        try:
            self._file = self._path.open("ab")
            self._file.truncate(size)
        except OSError as error:
            raise SaveError(f"{self._path} cannot be written: {error.strerror}") from error

    @property
    def has_tensorboard(self) -> bool:
        """Whether TensorBoard is installed."""
        return self._board is not None

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a line; numbers also go to TensorBoard and W&B under their names and the record's `step`."""
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise SaveError(f"{self._path} cannot be written: {error.strerror}") from error
        numbers = {
            name: value
            for name, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def sync(self) -> int:
        """Waits until the file is on the disk; returns its length."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SaveError(f"{self._path} cannot be written: {error.strerror}") from error
        return self._path.stat().st_size

    def close(self) -> None:
        """Closes all files."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def retrieval_entropy(selections: list[Selection]) -> float | None:
    """Returns the mean entropy of the weights, in nats, of tokens that had a choice; None if none had.

    Args:
        selections: what retrievals chose, with weights `[B, T, H, K]`.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    for selection in selections:
        several = (selection.indices >= 0).sum(dim=-1) > 1
        weights = selection.weights.detach()[several].double()
        totals[0] += torch.special.entr(weights).sum().cpu()
        totals[1] += weights.shape[0]
    return float(totals[0] / totals[1]) if totals[1] else None


def peak_flops(device: torch.device, told_tflops: float) -> float | None:
    """Returns the products a second that the device could do at best; None if that is not known."""
    if told_tflops:
        return told_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in _PEAKS if part in name), None)


def _tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory / TENSORBOARD))


def _wandb(directory: Path, project: str) -> Any:
    wandb = require("wandb", f"train.wandb_project = {project!r}")
    return wandb.init(project=project, dir=str(directory), name=directory.name)
