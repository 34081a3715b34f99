"""Runs small enough that a step takes milliseconds."""

from pathlib import Path
from typing import Any

import torch
from small_models import SMALL
from torch import nn

from hsa_compile.model.training.config import RunConfig
from hsa_compile.model.training.config_file import from_dict
from hsa_compile.model.training.feed import apply_stage, keep_own, make_batch, mixtures, plan_step
from hsa_compile.model.training.optimizer import make_optimizer
from hsa_compile.model.training.processes import Processes, shard, with_meshes
from hsa_compile.model.training.step import LossModel, StepResult, run_step
from hsa_compile.model.transformer import HSATransformer

SECTIONS: dict[str, Any] = {
    "model": {
        **SMALL.to_dict(),
        "vocab_size": 256,
        "num_groups": 1,
        "chunk_size": 8,
        "window": 16,
        "init_std": 0.1,
    },
    "train": {
        "steps": 6,
        "lr": 1e-3,
        "warmup_steps": 2,
        "precision": "float32",  # on any CPU
        "save_every": 2,
        "probe_every": 0,
        "log_every": 3,
    },
    "stages": [
        {"share": 0.5, "min_seq_len": 50, "seq_len": 70, "batch_tokens": 300},
        {"share": 0.5, "min_seq_len": 60, "seq_len": 90, "batch_tokens": 300, "window": 12, "top_k": 2},
    ],
}


def small_run(
    *, model: dict[str, Any] | None = None, stages: list[dict[str, Any]] | None = None, **train: Any
) -> RunConfig:
    """A run of a few steps, with some fields changed."""
    return from_dict(
        {
            "model": {**SECTIONS["model"], **(model or {})},
            "train": {**SECTIONS["train"], **train},
            "data": {},
            "stages": stages or SECTIONS["stages"],
        }
    )


class Trainer:
    """What a process needs for the steps of a run: the model, sharded, and its optimizer."""

    def __init__(self, run: RunConfig, processes: Processes, dtype: torch.dtype = torch.float32) -> None:
        self.run, self.processes = run, with_meshes(processes, run)
        self.model = HSATransformer(run.model).to(dtype).train()
        encoder = self.model.chunk_encoder
        if encoder is not None and encoder.token_proj is not None:
            # While these weights are zero, all landmarks of a chunk are equal, and rounding chooses one of them.
            nn.init.normal_(encoder.token_proj.weight, std=run.model.init_std)
        self.model.checkpoint_activations = run.train.checkpoint_activations
        self.model.chunk_exchange = run.train.chunk_exchange
        self.loss_model = LossModel(self.model, run.train.loss_chunk, run.train.retrieval_loss)
        shard(self.loss_model, self.model, self.processes)
        self.optimizer = make_optimizer(self.model, run.train)

    def step(self, number: int) -> StepResult:
        """Moves the weights by the process's rows of a step."""
        plan, run = plan_step(self.run, number), self.run
        groups = {"rank": self.processes.row_group, "world_size": self.processes.num_row_groups}
        batch = make_batch(mixtures(run, None)[plan.stage], plan, seed=0, **groups)
        apply_stage(self.model, run.model_in(run.stages[plan.stage]))
        batch = keep_own(batch, self.model.own_text(plan.length - 1))
        return run_step(self.loss_model, self.optimizer, batch, run.train, self.processes)


def write_toml(path: Path, run: RunConfig) -> Path:
    """The run's config as a file that `--config` reads."""
    lines = []
    values = run.to_dict()
    for section in ("model", "train", "data"):
        lines += [f"[{section}]", *(f"{name} = {_toml(value)}" for name, value in values[section].items())]
    for stage in values["stages"]:
        lines += ["[[stages]]", *(f"{name} = {_toml(value)}" for name, value in stage.items() if value is not None)]
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + "}"
    return repr(list(value) if isinstance(value, tuple) else value)
