"""What is recorded while a run goes on: a JSONL file that can be cut back, TensorBoard, Weights & Biases."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hsa_compile.errors import HSACompileWarning, SaveError, warn_user
from hsa_compile.files import end_of_last_line, open_regular
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers.hs_attention import Selection
from hsa_compile.model.tasks.haystack import NoiseHaystack
from hsa_compile.model.tasks.mixture import Mixture, training_sample
from hsa_compile.model.tasks.retrieval import make_sample
from hsa_compile.model.tasks.sample import TaskSample
from hsa_compile.model.training.config import MAX_ROWS, RunConfig
from hsa_compile.model.training.feed import StepPlan, apply_stage, lacks_text, stack_samples
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.training.step import LossModel, autocast, normalized_weights
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
    ("L40", 181.0),
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
        size: the length in bytes that the JSONL file is cut to; later records belong to steps that are run again. A
            file that is shorter has lost records, which a warning says.
        wandb_project: the Weights & Biases project; empty for none.

    Raises:
        SaveError: the file cannot be written; any call may raise it.
        MissingDependency: a project is named, and wandb is not installed.
    """

    def __init__(self, directory: Path, *, size: int = 0, wandb_project: str = "") -> None:
        self._path = directory / METRICS_FILE
        self._board = _tensorboard(directory)
        self._wandb = _wandb(directory, wandb_project) if wandb_project else None
        with self._written():
            self._file = open_regular(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            there = os.fstat(self._file).st_size
            os.ftruncate(self._file, min(size, there))
            whole = end_of_last_line(self._file)
        if whole < size:
            warn_user(
                f"{self._path} has lost records: it holds {whole} bytes of whole lines, and had {size} when the "
                "checkpoint was written",
                HSACompileWarning,
            )

    @property
    def has_tensorboard(self) -> bool:
        """Whether TensorBoard is installed."""
        return self._board is not None

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a line; numbers also go to TensorBoard and W&B under their names and the record's `step`."""
        line = memoryview(json.dumps(record).encode() + b"\n")
        with self._written():
            while line:
                line = line[os.write(self._file, line) :]
        numbers = {
            name: value
            for name, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        if self._board is not None:
            with self._written():
                for name, value in numbers.items():
                    self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def sync(self) -> int:
        """Waits until the file is on the disk; returns its length."""
        with self._written():
            os.fsync(self._file)
            return os.fstat(self._file).st_size

    def close(self) -> None:
        """Closes all files."""
        os.close(self._file)
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            with self._written():
                self._board.close()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(
                f"{self._path} cannot be written: {error.strerror or error}; --resume goes on from the last checkpoint"
            ) from error


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


LONGER = 4  # the probe also looks at so many times the training length
_HELD_OUT_SEED = 2**31  # seeds of runs are below it
_TASK = "s-niah"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        held_out_loss: the loss as the run's last stage defines it, on rows that training never sees; None if there is
            too little text for a row of them.
        accuracy: the share of single needles in noise that were found, by teacher-forced exact match, for each length.
        hit_rate: the share of answer bytes at which a chunk of the needle was among the selected ones, for each length;
            empty without a memory.
    """

    held_out_loss: float | None
    accuracy: dict[int, float]
    hit_rate: dict[int, float]

    def record(self) -> dict[str, float]:
        """Returns names and numbers, as they are written to the records."""
        found = {} if self.held_out_loss is None else {"held_out_loss": self.held_out_loss}
        found |= {f"{_TASK}@{length}": value for length, value in self.accuracy.items()}
        return found | {f"hit_rate@{length}": value for length, value in self.hit_rate.items()}


class Probe:
    """Measures a model with the same samples each time.

    Args:
        run: the config of the run.
        mixture: what the last stage draws from, with the validation split for the corpus (`held_out_mixture`).
        processes: the processes among which this one is; each computes the same.
    """

    def __init__(self, run: RunConfig, mixture: Mixture, processes: Processes) -> None:
        self._run, self._mixture, self._processes = run, mixture, processes
        self._stage = run.stages[-1]
        self._config = run.model_in(self._stage)

    def measure(self, loss_model: LossModel, config: ModelConfig) -> ProbeResult:
        """Runs the probe.

        Args:
            loss_model: the model whose `forward` is called, in evaluation mode and as the last stage sets it.
            config: the config with the window and top-k that are set again afterwards.
        """
        with _evaluating(loss_model), autocast(self._run.train.precision, self._processes.device):
            apply_stage(loss_model, self._config)
            accuracy, hit_rate = {}, {}
            for length in self._lengths():
                found, hits = self._find_needles(loss_model, length)
                accuracy[length] = found
                if hits is not None:
                    hit_rate[length] = hits
            result = ProbeResult(
                held_out_loss=self._held_out_loss(loss_model), accuracy=accuracy, hit_rate=hit_rate
            )  # fmt: skip
            apply_stage(loss_model, config)
        return result

    def _lengths(self) -> list[int]:
        """Returns the lengths to probe; none where the vocabulary is not bytes, which the needles are."""
        if not self._stage.synthetic_share or self._stage.seq_len < self._mixture.least_length:
            return []
        return [self._stage.seq_len, LONGER * self._stage.seq_len]

    def _held_out_loss(self, loss_model: LossModel) -> float | None:
        if lacks_text(self._stage, self._mixture.corpus):
            return None
        total = torch.zeros((), dtype=torch.float64)
        length = self._stage.seq_len
        rows = max(1, min(self._run.train.probe_samples, self._stage.batch_tokens // length))
        plan = StepPlan(step=0, stage=len(self._run.stages) - 1, length=length, num_rows=rows)
        parts = -(-self._run.train.probe_samples // rows)
        for part in range(parts):
            samples = [
                training_sample(self._mixture, length, _HELD_OUT_SEED + self._run.train.seed, part * MAX_ROWS + row)
                for row in range(rows)
            ]
            batch = stack_samples(plan, samples)
            weights, _ = normalized_weights(batch, Processes(device=torch.device("cpu")))
            device = self._processes.device
            loss, _ = loss_model(batch.tokens.to(device), weights.to(device), None, None)
            total += self._processes.sum_of_row(loss).cpu()
        return float(total / parts)

    def _find_needles(self, loss_model: LossModel, length: int) -> tuple[float, float | None]:
        samples = [
            make_sample(
                _TASK,
                length=length,
                seed=_HELD_OUT_SEED + self._run.train.seed,
                index=index,
                haystack=NoiseHaystack(),
                min_distance=self._mixture.min_distance,
            )
            for index in range(self._run.train.probe_samples)
        ]
        rows = max(1, self._stage.batch_tokens // length)
        found = 0
        hits: list[float] = []
        for begin in range(0, len(samples), rows):
            part = samples[begin : begin + rows]
            tokens = torch.from_numpy(np.stack([sample.tokens for sample in part]).astype(np.int64))
            selections: list[Selection] = []
            last = length - min(sample.answer_spans[0][0] for sample in part)
            predicted = loss_model.predict(tokens.to(self._processes.device), last, selections).cpu().numpy()
            found += sum(sample.is_answered_by(row) for sample, row in zip(part, predicted, strict=True))
            if selections:
                hits += _hits(part, selections, self._config)
        return found / len(samples), float(np.mean(hits)) if hits else None


def _hits(samples: list[TaskSample], selections: list[Selection], config: ModelConfig) -> list[float]:
    """Says for each answer byte whether any retrieval had chosen a chunk that holds a byte of the needle."""
    indices = [selection.indices.cpu().numpy() for selection in selections]
    return [
        float(any(_overlaps(chosen[row, config.layer_position(position)], sample, config) for chosen in indices))
        for row, sample in enumerate(samples)
        for start, end in sample.answer_spans
        for position in range(start - 1, end - 1)  # the place before each byte, where it is predicted
    ]


def _overlaps(chosen: npt.NDArray[np.int32], sample: TaskSample, config: ModelConfig) -> bool:
    chunks = {
        config.layer_position(place) // config.chunk_size
        for needle in (sample.plan.needles[index] for index in sample.plan.asked)
        for place in range(needle.start, needle.end)
    }
    return bool(chunks & set(chosen.ravel().tolist()))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
