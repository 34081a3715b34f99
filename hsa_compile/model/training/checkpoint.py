"""Checkpoints of a run: directories that are there as a whole or not at all, without pickle.

`step-00000100/` holds `state.json`, `tensors.safetensors` (weights, optimizer, random states), or for several
processes `shards/`, one safetensors file each as PyTorch's distributed checkpoints (DCP) write them, which any other
number of processes can load. `state.json` also has the checksums of these files, and its own.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from hsa_compile.checks import check_count, one_line, shown
from hsa_compile.errors import HSACompileWarning, SaveError, warn_user
from hsa_compile.files import file_sha256, make_directory, read_summed_json, sync_directory, write_summed_json
from hsa_compile.model.layers.moe import saved_name
from hsa_compile.model.tensor_files import read_tensors, write_tensors
from hsa_compile.model.training.processes import Processes

FORMAT_VERSION = 2
STATE_FILE, TENSORS_FILE, SHARDS = "state.json", "tensors.safetensors", "shards"
_PREFIX = "step-"
_NEW, _OLD = ".new", ".old"  # endings of hidden names, of what is being written and what is being removed
_ADAMW_MOMENTS, _MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
_FILES = "files"
_CPU_RANDOM, _CUDA_RANDOM = "random.cpu", "random.cuda"


_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """All of a run's state that is no tensor.

    Attributes:
        step: the step that comes next, which is also how far the data were read.
        tokens: how many tokens were trained on so far, all processes together.
        seconds: how long training took so far.
        stage: the number of the stage of the next step.
        metrics_bytes: length of the metrics file; what lies beyond belongs to steps that are run again.
        score: the held-out loss, by which the best checkpoint is kept; None if it was not measured.
        data_digest: the digest of the corpus; empty without one.
        world_size: how many processes wrote the checkpoint.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stage: int = 0
    metrics_bytes: int = 0
    score: float | None = None
    data_digest: str = ""
    world_size: int = 1


def save_checkpoint(
    root: Path, state: RunState, model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> Path:
    """Writes a checkpoint; every process calls it.

    Args:
        root: the directory of all checkpoints.
        state: the state after the last step.
        model: the model whose weights and buffers are kept, sharded or not.
        optimizer: the optimizer of the model's parameters.
        processes: the processes among which this one is.

    Raises:
        SaveError: the checkpoint cannot be written; those that were there are untouched.
    """
    path = checkpoint_path(root, state.step)
    temporary = root / f".{path.name}{_NEW}"

    def begin() -> None:
        _remove(temporary)
        make_directory(temporary)

    def put(files: dict[str, str]) -> None:
        write_summed_json(temporary / STATE_FILE, {"format_version": FORMAT_VERSION, **asdict(state), _FILES: files})
        _remove(path)
        temporary.replace(path)
        sync_directory(root)

    try:
        _first_acts(processes, begin)
        if processes.world_size == 1:
            write_tensors(temporary / TENSORS_FILE, {**_tensors(model, optimizer), **_random_states()}, {})
        else:
            save(
                _tensors(model, optimizer),
                storage_writer=HuggingFaceStorageWriter(str(temporary / SHARDS), save_distributed=True),
            )
            _first_acts(processes, lambda: _sync_files(temporary / SHARDS))
        files = _checksums(temporary, processes)
        _first_acts(processes, lambda: put(files))
    except (OSError, CheckpointException, SaveError) as error:
        raise SaveError(f"{path} cannot be written ({_reason(error)}); earlier checkpoints are untouched") from error
    finally:
        if processes.is_first:
            with contextlib.suppress(OSError):  # `remove_leftovers` tries again when the run goes on
                _remove(temporary)
    return path


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> RunState:  # fmt: skip
    """Puts a checkpoint's weights and optimizer state in place, whatever number of processes wrote it.

    Raises:
        SaveError: a file is missing, damaged, foreign, or of another model; the message names it.
    """
    state, files = _agreed(processes, lambda: _read(path))[0]
    found = _checksums(path, processes)
    if damaged := sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name)):
        raise SaveError(
            f"{path} is damaged: {one_line(', '.join(damaged[:3]))} is not what {STATE_FILE} describes (SHA-256)"
        )
    wanted = _tensors(model, optimizer)
    if (path / SHARDS).is_dir():
        _agreed(processes, lambda: _load_shards(path / SHARDS, wanted))
    else:
        _agreed(processes, lambda: _load_whole(path / TENSORS_FILE, wanted))
    return state


def load_newest(
    paths: list[Path], model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> RunState:
    """Loads the last of the checkpoints that is whole; those after it are moved aside, each with a warning.

    Args:
        paths: the checkpoints, the oldest first; at least one.
        model, optimizer, processes: as in `load_checkpoint`.

    Raises:
        SaveError: none is whole; the message is that of the newest.
    """
    faults: list[tuple[Path, SaveError]] = []
    for path in reversed(paths):
        try:
            state = load_checkpoint(path, model, optimizer, processes)
            break
        except SaveError as error:
            faults.append((path, error))
    else:
        raise faults[0][1]
    processes.wait()
    for path, fault in faults if processes.is_first else ():
        aside = path.with_name(f"damaged-{path.name}")
        _remove(aside)
        path.replace(aside)  # the next steps would take it for the newest, and keep it instead of whole ones
        warn_user(
            f"a checkpoint was left out: {fault}; it is now {aside.name}, and the run goes on from step {state.step}",
            HSACompileWarning,
        )
    return state


def read_state(path: Path) -> RunState:
    """Reads what `state.json` of a checkpoint says.

    Raises:
        SaveError: the file is missing, damaged or foreign.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[RunState, dict[str, str]]:
    """Reads the state, and the checksums of the files beside it."""
    values, where = read_summed_json(path / STATE_FILE), f"{path / STATE_FILE}: "
    files = values.pop(_FILES, None)
    if values.pop("format_version", None) != FORMAT_VERSION or set(values) != {spec.name for spec in fields(RunState)}:
        raise SaveError(f"{path / STATE_FILE} is no checkpoint of this version of hsa-compile")
    state = RunState(**values)
    for name in ("step", "tokens", "stage", "metrics_bytes"):
        check_count(where + name, values[name], 0, 2**63 - 1, error=SaveError)
    check_count(f"{where}world_size", state.world_size, 1, 2**31, error=SaveError)
    for name in ("seconds", "score"):
        is_number = isinstance(values[name], int | float) and not isinstance(values[name], bool)
        if not (is_number and abs(values[name]) < 1e300) and not (name == "score" and values[name] is None):
            raise SaveError(f"{where}{name} = {shown(values[name])} must be a number")
    if not isinstance(state.data_digest, str):
        raise SaveError(f"{where}data_digest = {shown(state.data_digest)} must be a text")
    if not isinstance(files, dict):
        raise SaveError(f"{where}{_FILES} = {shown(files)} must be an object: the checksum of each file")
    if path.name.startswith(_PREFIX) and path.name != checkpoint_path(path.parent, state.step).name:
        raise SaveError(f"{where}step = {state.step} is not the step of {path.name}")
    return state, files


def checkpoints(root: Path) -> list[Path]:
    """Returns all whole checkpoints, the oldest first."""
    return sorted(path for path in root.glob(f"{_PREFIX}*") if path.is_dir())


def checkpoint_path(root: Path, step: int) -> Path:
    """Returns where the checkpoint before a step lies."""
    return root / f"{_PREFIX}{step:08d}"


def best_checkpoint(root: Path) -> Path | None:
    """Returns the one with the lowest held-out loss, of those that are kept; None if none was measured."""
    scores = []
    for path in checkpoints(root):
        with contextlib.suppress(SaveError):  # one that is damaged is the best of none
            score = read_state(path).score
            scores += [(score, path)] if score is not None else []
    return min(scores)[1] if scores else None


def prune(root: Path, keep_last: int) -> None:
    """Removes all checkpoints but the last ones and the best."""
    found = checkpoints(root)
    best = best_checkpoint(root)
    for path in found[:-keep_last]:
        if path != best:
            _remove(path.replace(path.with_name(f".{path.name}{_OLD}")))  # a half removed one must not pass for whole


def remove_leftovers(root: Path) -> None:
    """Removes what a process that died was writing or removing."""
    for ending in (_NEW, _OLD):
        for path in root.glob(f".{_PREFIX}*{ending}"):
            _remove(path)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns weights, buffers and moments by name; they are the run's own tensors, which a load fills."""
    found = {f"model.{saved_name(name)}": tensor for name, tensor in model.state_dict().items()}
    # Groups of Muon, and no others, say how many steps its iteration has.
    by_muon = {weight for group in optimizer.param_groups if "ns_steps" in group for weight in group["params"]}
    for name, weight in ((saved_name(name), weight) for name, weight in model.named_parameters()):
        state: dict[str, Any] = optimizer.state[weight]
        moments = _MUON_MOMENTS if weight in by_muon else _ADAMW_MOMENTS
        if not state:  # the optimizer has made no step yet
            state |= {moment: torch.zeros_like(weight) for moment in moments}
            if weight not in by_muon:
                state["step"] = torch.zeros((), dtype=torch.float32, device=local(weight).device)
        found |= {f"optimizer.{name}.{moment}": state[moment] for moment in moments}
        if "step" in state:
            found[f"optimizer.{name}.step"] = state["step"].view(1)
    return found


def _checksums(directory: Path, processes: Processes) -> dict[str, str]:
    """Returns the SHA-256 of each file but the state, by its path; the processes share the reading.

    Raises:
        SaveError: in every process, if one of them cannot read a file.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != STATE_FILE)
    own = files[processes.rank :: processes.world_size]

    def read() -> dict[str, str]:
        try:
            return {str(path.relative_to(directory)): file_sha256(path) for path in own}
        except OSError as error:
            raise SaveError(f"{directory} cannot be read: {error}") from error

    found: dict[str, str] = {}
    for part in _agreed(processes, read):
        found |= part
    return found


def _agreed(processes: Processes, act: Callable[[], _Result]) -> list[_Result]:
    """Acts in each process and returns what each found; if one fails all raise its error, so that none waits for it.

    Raises:
        SaveError: the one of the first process that failed.
    """
    result, fault = None, None
    try:
        result = act()
    except (OSError, SaveError) as error:
        fault = str(error)
    results, faults = zip(*processes.gather((result, fault)), strict=True)
    if first := next((each for each in faults if each is not None), None):
        raise SaveError(first)
    return list(results)


def _first_acts(processes: Processes, act: Callable[[], object]) -> None:
    """Acts in the first process, while the others wait; an error of it is raised in all, as `_agreed` does."""
    _agreed(processes, act if processes.is_first else lambda: None)


def _load_whole(path: Path, wanted: dict[str, Tensor]) -> None:
    saved = read_tensors(path)
    random_state, cuda = saved.pop(_CPU_RANDOM, None), saved.pop(_CUDA_RANDOM, None)
    kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in saved.items()}
    if kinds != {name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()}:
        raise SaveError(f"{path} is of another model than the run's config describes")
    try:
        if random_state is None:
            raise ValueError(f"{_CPU_RANDOM} is missing")
        torch.set_rng_state(random_state)
        if cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda)
    except (RuntimeError, TypeError, ValueError) as error:
        raise SaveError(f"{path} has no random state: {error}") from error
    with torch.no_grad():
        for name, tensor in wanted.items():
            if isinstance(tensor, DTensor):
                from_whole = torch.distributed.tensor.distribute_tensor(
                    saved[name].to(local(tensor).device), tensor.device_mesh, tensor.placements
                )
                tensor.copy_(from_whole)
            else:
                tensor.copy_(saved[name])


def _load_shards(path: Path, wanted: dict[str, Tensor]) -> None:
    try:
        load(wanted, storage_reader=HuggingFaceStorageReader(str(path)))
    except (OSError, RuntimeError, ValueError, CheckpointException) as error:
        raise SaveError(f"{path} cannot be loaded: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Returns what went wrong, and in which process; DCP's exception has a traceback for each as its text."""
    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(f"process {rank}: {fault}" for rank, (fault, _) in sorted(error.failures.items()))


def _random_states() -> dict[str, Tensor]:
    states = {_CPU_RANDOM: torch.get_rng_state()}
    if torch.cuda.is_available():
        states[_CUDA_RANDOM] = torch.cuda.get_rng_state()
    return states


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a sharded tensor that this process holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sync_files(directory: Path) -> None:
    for file in directory.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    sync_directory(directory)


def _remove(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
