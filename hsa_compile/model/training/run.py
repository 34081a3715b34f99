"""A training run in its directory: opened anew or where it stopped, one step after the other, saved and closed.

`config.json` is the resolved config, `metrics.jsonl` the records, `checkpoints/` what a run goes on from, `model/` the
trained model as `from_pretrained`, `generate` and `eval` read it.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from hsa_compile.errors import InvalidArgument, SaveError, TrainingError
from hsa_compile.files import make_directory, read_json, write_json
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.cost.info import num_positions
from hsa_compile.model.cost.workload import of_a_part, problems
from hsa_compile.model.data.tokenizer import BYTES
from hsa_compile.model.layers.hs_attention import Selection
from hsa_compile.model.layers.moe import saved_name
from hsa_compile.model.layers.picked_chunks import ChunkTraffic
from hsa_compile.model.pretrained import save_pretrained
from hsa_compile.model.training.checkpoint import (
    RunState,
    checkpoints,
    load_newest,
    local,
    prune,
    remove_leftovers,
    save_checkpoint,
)
from hsa_compile.model.training.config import RunConfig, Stage
from hsa_compile.model.training.config_file import from_dict
from hsa_compile.model.training.feed import (
    Feed,
    StepBatch,
    apply_stage,
    check_rows,
    digest,
    held_out_mixture,
    keep_own,
    lengths,
    mixtures,
    open_corpus,
    parts_of,
    stage_at,
)
from hsa_compile.model.training.metrics import MetricsLog, Probe, peak_flops, retrieval_entropy
from hsa_compile.model.training.optimizer import make_optimizer
from hsa_compile.model.training.pace import RECENT, OwnTime, StepFlops, straggler
from hsa_compile.model.training.processes import Processes, shard, with_meshes
from hsa_compile.model.training.step import LossModel, StepResult, chosen_precision, compiled, run_step
from hsa_compile.model.transformer import HSATransformer
from hsa_compile.problem import Problem

CONFIG_FILE, CHECKPOINTS, MODEL = "config.json", "checkpoints", "model"
_LOCK = ".lock"

Record = Mapping[str, Any]


def saved_config(directory: Path) -> RunConfig | None:
    """Reads the config of the run that a directory holds; None if it holds none."""
    path = directory / CONFIG_FILE
    if not path.exists():
        return None
    try:
        return from_dict(read_json(path))
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error}") from error


class TrainingRun:
    """A run and all that it holds between steps.

    Args:
        config: the config of the run; if it goes on, the saved one.
        directory: the directory of the run.
        processes: the processes among which this one is.
        resume: whether to go on from the last checkpoint; without a checkpoint the run begins.
        on_record: is called with each record on the first process.

    Raises:
        InvalidArgument: the directory holds a run already, or the config does not fit together.
        SaveError: a file cannot be written, or a checkpoint cannot be read.
        TrainingError: another process trains in the directory, or the corpus is not the one that the run began with.
    """

    def __init__(
        self, config: RunConfig, directory: Path, processes: Processes, *, resume: bool = False,
        on_record: Callable[[Record], None] = lambda record: None,
    ) -> None:  # fmt: skip
        processes = with_meshes(processes, config)
        self.config, self.directory, self.processes = config, directory, processes
        self._on_record = on_record
        self._log: MetricsLog | None = None
        self._lock: filelock.BaseFileLock | None = None
        if not resume:
            self._check_is_new()
        if processes.is_first:
            open_corpus(config)  # prepares what is missing
        processes.wait()
        corpus = open_corpus(config)
        self._tokenizer = corpus.tokenizer() if corpus is not None else BYTES
        self._mixtures = mixtures(config, corpus)
        check_rows(config, self._mixtures, processes.num_row_groups)
        torch.manual_seed(config.train.seed)
        self.model = HSATransformer(config.model).to(processes.device).train()
        self.model.checkpoint_activations = config.train.checkpoint_activations
        self.model.chunk_exchange = config.train.chunk_exchange
        self.loss_model = LossModel(self.model, config.train.loss_chunk, config.train.retrieval_loss)
        shard(self.loss_model, self.model, processes)
        is_alone = processes.world_size == 1
        self._own_time = OwnTime(None if is_alone or config.train.compile else self.model, processes.device)
        self._own_pace = 0.0  # seconds a token, in the step before
        self._own_paces: deque[tuple[float, ...]] = deque(maxlen=RECENT)
        self._forward: Any = compiled(self.loss_model) if config.train.compile else self.loss_model
        self.optimizer = make_optimizer(self.model, config.train)
        self.state = RunState(data_digest=digest(corpus), world_size=processes.world_size)
        self._checkpoints = directory / CHECKPOINTS
        self._probe = Probe(config, held_out_mixture(config, corpus), processes) if config.train.probe_every else None
        try:
            self._open_directory(resume)
        except BaseException:
            self.close()
            raise
        self._flops = StepFlops(config, processes.num_row_groups)
        self._peak = peak_flops(processes.device, config.train.peak_tflops)
        self._saved_step = self.state.step if checkpoints(self._checkpoints) else -1

    @property
    def is_finished(self) -> bool:
        """Whether all steps were made."""
        return self.state.step >= self.config.train.steps

    @property
    def has_tensorboard(self) -> bool:
        """Whether TensorBoard files are written."""
        return self._log is not None and self._log.has_tensorboard

    def train(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Makes the steps that are left, saves, and writes the model.

        Args:
            should_stop: is asked before each step; once it says so, the run saves after that step and returns.

        Returns:
            whether the run is finished.
        """
        feed = Feed(
            self.config,
            self._mixtures,
            first_step=self.state.step,
            rank=self.processes.row_group,
            world_size=self.processes.num_row_groups,
        )
        try:
            stopping = False
            while not (self.is_finished or stopping):
                with self._own_time.counted():
                    batch = feed.next()
                stopping = self._step(batch, should_stop())
        finally:
            feed.close()
        if self._saved_step != self.state.step:
            self._save()
        self._export()
        return self.is_finished

    def close(self) -> None:
        """Closes the records, and lets other processes have the directory."""
        try:
            if self._log is not None:
                self._log.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _step(self, batch: StepBatch, should_stop: bool) -> bool:
        train, number = self.config.train, batch.plan.step + 1
        began = time.perf_counter()
        apply_stage(self.model, self._model_config(batch.plan.stage))
        own = self.model.own_text(batch.plan.length - 1)
        batch = keep_own(batch, own)
        is_logged = number % train.log_every == 0 or number == train.steps
        selections: list[Selection] | None = [] if is_logged and not train.compile else None
        result = run_step(
            self._forward,
            self.optimizer,
            batch,
            train,
            self.processes,
            stopping=should_stop,
            own_time=self._own_pace,
            selections=selections,
            frozen=parts_of(self.model, self.config.stages[batch.plan.stage].frozen),
        )
        self._own_pace = self._own_time.take() / (len(batch.tokens) * (own.stop - own.start))
        if all(result.own_times):  # in the first step of a run there was none before
            self._own_paces.append(result.own_times)
        tokens, seconds = batch.plan.num_rows * batch.plan.length, time.perf_counter() - began
        self.state = replace(
            self.state,
            step=number,
            tokens=self.state.tokens + tokens,
            seconds=self.state.seconds + seconds,
            stage=stage_at(self.config, number),
            score=None,
        )
        record = self._record(batch, result, tokens / seconds)
        if is_logged and (found := straggler(self._own_paces)) is not None:
            record["slowest_process"], record["slowest_over_median"] = found
        if selections:
            record["retrieval_entropy"] = retrieval_entropy(selections)
        self._write(record)
        if self._probe is not None and (number % train.probe_every == 0 or number == train.steps):
            self._measure()
        if train.save_every and number % train.save_every == 0:
            self._save()
        return result.stopping

    def _record(self, batch: StepBatch, result: StepResult, tokens_a_second: float) -> dict[str, Any]:
        record = {
            "step": batch.plan.step + 1,
            "loss": result.loss,
            "text_loss": result.text_loss,
            "answer_loss": result.answer_loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "stage": batch.plan.stage,
            "seq_len": batch.plan.length,
            "tokens": self.state.tokens,
            "tokens_per_second": tokens_a_second,
            "seconds": self.state.seconds,
        }
        config = self.config.model
        if result.retrieval_loss is not None and config.has_memory and not config.has_landmark_tokens:
            record["retrieval_loss"] = result.retrieval_loss
        if result.router_load is not None:
            record["router_max_over_mean_load"] = result.router_load
        if self._peak is not None:
            steps_a_second = tokens_a_second / (batch.plan.num_rows * batch.plan.length)
            flops = self._flops(batch.plan.stage, batch.plan.length)
            record["mfu"] = steps_a_second * flops / self._peak / self.processes.world_size
        if self.processes.device.type == "cuda":
            record["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        return record

    def _measure(self) -> None:
        assert self._probe is not None
        result = self._probe.measure(self.loss_model, self._model_config(self.state.stage))
        if result.held_out_loss is not None and not math.isfinite(result.held_out_loss):
            raise TrainingError(
                f"the held_out_loss after step {self.state.step} is {result.held_out_loss}; --resume goes on from the "
                "last checkpoint"
            )
        self.state = replace(self.state, score=result.held_out_loss)
        self._write({"step": self.state.step, "probe": True, **result.record()})

    def _write(self, record: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(record)
            self._on_record(record)

    def _save(self) -> None:
        self._check_weights()
        if self._log is not None:
            self.state = replace(self.state, metrics_bytes=self._log.sync())
        save_checkpoint(self._checkpoints, self.state, self.model, self.optimizer, self.processes)
        self._saved_step = self.state.step
        if self.processes.is_first:
            prune(self._checkpoints, self.config.train.keep_last)

    def _check_weights(self) -> None:
        """Raises TrainingError, in each process, if a weight is not finite: no run can go on from such a checkpoint."""
        own = [name for name, weight in self.model.named_parameters() if not bool(local(weight).isfinite().all())]
        if names := sorted({name for part in self.processes.gather(own) for name in part}):
            raise TrainingError(
                f"the weights {', '.join(names[:3])} are not finite after step {self.state.step}; a lower train.lr "
                f"than {self.config.train.lr:g} may help; --resume goes on from the last checkpoint"
            )

    def _export(self) -> None:
        """Writes the weights as they are now, with the window and top-k of their stage, and with sharpened scores."""
        weights = self.model.state_dict()
        if self.processes.world_size > 1:
            weights = get_model_state_dict(
                self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )  # fmt: skip
            weights = {saved_name(name): weight for name, weight in weights.items()}
        if not self.processes.is_first:
            return
        config = self._model_config(stage_at(self.config, self.state.step - 1))
        scale = config.retrieval_scale
        if config.fusion == "softmax":
            scale *= self.config.train.sharpen_scores
        with torch.device("meta"):
            model = HSATransformer(replace(config, retrieval_scale=scale))
        model.load_state_dict(weights, assign=True)
        trained = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "precision": chosen_precision(self.config.train.precision, self.processes.device),
            "config": self.config.to_dict(),
        }
        save_pretrained(model, self.directory / MODEL, tokenizer=self._tokenizer, extra={"training": trained})

    def _model_config(self, stage: int) -> ModelConfig:
        return self.config.model_in(self.config.stages[stage])

    def _check_is_new(self) -> None:
        if (self.directory / CONFIG_FILE).exists():
            raise InvalidArgument(f"{self.directory} holds a run; --resume goes on with it, or choose another folder")

    def _open_directory(self, resume: bool) -> None:
        """Begins a directory, or puts the state of its last checkpoint in place; no other process trains in it."""
        if self.processes.is_first:
            make_directory(self._checkpoints)
            self._lock = _locked(self.directory)
            if not resume:
                self._check_is_new()  # another process may have begun it since
            remove_leftovers(self._checkpoints)
        self.processes.wait()
        if found := checkpoints(self._checkpoints):
            text = self.state.data_digest
            state = load_newest(found, self.model, self.optimizer, self.processes)
            if state.data_digest != text:
                raise TrainingError(
                    f"data.corpus {self.config.data.corpus!r} has other text than when {self.directory} began; "
                    "begin anew in another folder"
                )
            self.state = replace(state, world_size=self.processes.world_size)
        if self.processes.is_first:
            write_json(self.directory / CONFIG_FILE, self.config.to_dict())
            size, project = self.state.metrics_bytes, self.config.train.wandb_project
            self._log = MetricsLog(self.directory, size=size, wandb_project=project)


def _locked(directory: Path) -> filelock.BaseFileLock:
    """Holds the directory of a run until the lock is released or this process ends."""
    lock = filelock.FileLock(directory / _LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise TrainingError(f"another process trains in {directory}; wait for it or name another folder") from error
    except OSError as error:
        raise SaveError(f"{directory} cannot be written: {error.strerror}") from error
    return lock


def run_problems(run: RunConfig, device: torch.device, world_size: int = 1) -> list[Problem]:
    """Returns one problem for each key of the cache that the steps of a run ask for.

    Args:
        run: the config of the run.
        device: the device that it computes on, which decides the dtype.
        world_size: how many processes share a step's rows.
    """
    # On a CPU the kernels are for float32: see `basic.without_cpu_autocast`.
    dtype = "float32" if device.type == "cpu" else chosen_precision(run.train.precision, device)
    found: dict[Problem, Problem] = {}
    for stage in run.stages:
        found = {**_stage_problems(run, stage, dtype, world_size), **found}
    return list(found.values())


def _stage_problems(run: RunConfig, stage: Stage, dtype: str, world_size: int) -> dict[Problem, Problem]:
    """Returns the problems of a stage by key; of shapes that share one, the longest stands for all."""
    config, parts = run.model_in(stage), run.train.context_parallel
    longest: dict[Problem, Problem] = {}
    for length in lengths(stage):
        rows = max(1, stage.batch_tokens // length // max(1, world_size // parts) // run.train.accumulation)
        asked = problems(config, rows, length - 1, dtype, in_batch_memory=stage.in_batch_memory)
        traffic = ChunkTraffic.of(
            config,
            parts=parts,
            rows=rows,
            places=num_positions(config, length - 1),
            forwards=2 if run.train.checkpoint_activations else 1,
            in_batch=stage.in_batch_memory,
        )
        own = [of_a_part(problem, traffic, run.train.chunk_exchange) for problem in asked]
        longest |= {problem.bucketed(): problem for problem in own}
    return longest
