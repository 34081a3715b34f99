"""What a model has read, saved as a directory, so that a book is read once and asked many times."""

import hashlib
import json
import re
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsa_compile.checks import check_count, shown
from hsa_compile.errors import InvalidArgument, SaveError
from hsa_compile.files import (
    check_sha256,
    file_sha256,
    make_directory,
    read_summed_json,
    sync_directory,
    write_summed_json,
)
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.inference.inference import ModelState
from hsa_compile.model.layer import Cache
from hsa_compile.model.layers.hs_attention import Selection
from hsa_compile.model.memory.memory import ChunkMemory
from hsa_compile.model.memory.shared import SharedMemory
from hsa_compile.model.tensor_files import read_tensors, write_tensors
from hsa_compile.model.transformer import HSATransformer

INDEX_FILE = "reading.json"
FORMAT, FORMAT_VERSION = "hsa-compile reading", 3
CACHES_FILE = "caches.safetensors"
_PREFIX = "reading-"
_FIELDS = {"model": str, "config": dict, "place": str, "by_rows": bool, "rows": list, "caches_sha256": dict}
_ROW_FIELDS = {"positions", "num_upper_past", "carried"}
_MOST_TOKENS = 2**40  # as many as a memory takes
_SAMPLES = 4096  # how many numbers of each tensor go into a fingerprint


def save_state(model: HSATransformer, state: ModelState, directory: str | Path) -> None:
    """Writes all that a model keeps of the texts it has read.

    The new reading is written beside the old one, and one rename of the index makes it the current one: a kill at
    any moment leaves a whole reading.

    Args:
        model: the model that has read.
        state: what it has read; it is not changed.
        directory: where it is written; it is made if it is not there.

    Raises:
        SaveError: a file cannot be written; the reading that was there is intact.
        InvalidArgument: several processes share the memory.
    """
    if isinstance(state.memory, SharedMemory):
        raise InvalidArgument("a reading whose memory several processes share cannot be saved; read in one process")
    directory = Path(directory)
    place = directory / f"{_PREFIX}{uuid.uuid4().hex}"
    make_directory(place)
    states = [state] if state.rows is None else state.rows
    try:
        rows = [_save_row(row, place / f"row{i}") for i, row in enumerate(states)]
        sync_directory(place)
        caches = {f"row{i}": file_sha256(place / f"row{i}" / CACHES_FILE) for i in range(len(states))}
        index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": fingerprint(model),
            "config": model.config.to_dict(),
            "place": place.name,
            "by_rows": state.rows is not None,
            "rows": rows,
            "caches_sha256": caches,
        }
        write_summed_json(directory / INDEX_FILE, index)
    except (SaveError, OSError) as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"{place} cannot be written ({error}); what was there is untouched") from error
    for old in directory.glob(f"{_PREFIX}*"):
        if old != place:
            shutil.rmtree(old, ignore_errors=True)


def load_state(model: HSATransformer, directory: str | Path, *, memory: str = "device") -> ModelState:
    """Opens the state that `save_state` wrote; what is read on leaves the files as they are.

    Args:
        model: the model that has read, with the same config, weights and dtype.
        directory: the directory of the reading.
        memory: where chunk keys and values will lie: `device`, `host` or `disk`, where they are mapped, not read.

    Raises:
        SaveError: a file is missing, damaged or foreign, or another model has read; the message names it.
        InvalidArgument: a file of the memory is missing or damaged, or `memory` is not allowed.
    """
    directory = Path(directory)
    path = directory / INDEX_FILE
    index = _read_index(path)
    if index["config"] != model.config.to_dict():
        changed = [name for name, value in model.config.to_dict().items() if index["config"].get(name) != value]
        raise SaveError(f"{path} was read by another model: {', '.join(changed) or 'fields'} of its config differ")
    if index["model"] != fingerprint(model):
        raise SaveError(f"{path} was read by another model: the same config, but other weights or another dtype")
    place = directory / index["place"]
    for row, digest in index["caches_sha256"].items():
        check_sha256(place / row / CACHES_FILE, digest, INDEX_FILE)
    states = [_load_row(model, values, place / f"row{i}", memory) for i, values in enumerate(index["rows"])]
    return replace(states[0], rows=states) if index["by_rows"] else states[0]


def _read_index(path: Path) -> dict[str, Any]:
    """Reads the index and checks the type and the range of each of its fields.

    Raises:
        SaveError: the file is missing, damaged or foreign; the message names the field.
    """
    index = read_summed_json(path)
    form, version = index.get("format"), index.get("format_version")
    if form != FORMAT or version != FORMAT_VERSION:
        raise SaveError(
            f"{path} has format {shown(form)}, version {shown(version)}; this hsa-compile reads {FORMAT!r}, version "
            f"{FORMAT_VERSION}"
        )
    for name, kind in _FIELDS.items():
        if not isinstance(index.get(name), kind):
            raise SaveError(f"{path}: {name} = {shown(index.get(name))} must be a {kind.__name__}")
    if not re.fullmatch(rf"{_PREFIX}[0-9a-f]{{32}}", index["place"]):
        raise SaveError(f"{path}: place = {shown(index['place'])} must be {_PREFIX} and 32 hexadecimal digits")
    rows = index["rows"]
    if not rows or not all(isinstance(row, dict) and row.keys() == _ROW_FIELDS for row in rows):
        raise SaveError(f"{path}: rows must be a list of objects with {', '.join(sorted(_ROW_FIELDS))}")
    if set(index["caches_sha256"]) != {f"row{i}" for i in range(len(rows))}:
        raise SaveError(f"{path}: caches_sha256 must have a checksum for each of {len(rows)} rows")
    by_rows = index["by_rows"]
    for row in rows:
        for name in _ROW_FIELDS:
            if not isinstance(row[name], list):
                raise SaveError(f"{path}: {name} = {shown(row[name])} must be a list")
            for value in row[name]:
                check_count(f"{path}: {name}", value, 0, _MOST_TOKENS, error=SaveError)
        batch = len(row["positions"])
        if batch != len(row["num_upper_past"]) or batch == 0 or (batch > 1 if by_rows else len(rows) > 1):
            raise SaveError(f"{path} contradicts itself: {len(rows)} rows, by_rows = {by_rows}, {shown(row)}")
    return index


def fingerprint(model: HSATransformer) -> str:
    """Returns a digest of the config and of a few thousand numbers of each tensor.

    It tells models apart in little time, even large ones, but does not prove that no bit differs.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _save_row(state: ModelState, place: Path) -> dict[str, Any]:
    make_directory(place)
    tensors = {"newest": state.newest, "pending": state.pending}
    for half, caches in (("lower", state.lower), ("upper", state.upper)):
        for i, cache in enumerate(caches):
            if cache is not None:
                tensors |= {f"{half}.{i}.{name}": getattr(cache, name) for name in cache.__slots__}
    for layer, selection in state.carried.items():
        tensors[f"carried.{layer}.indices"] = selection.indices
        tensors[f"carried.{layer}.weights"] = selection.weights
    write_tensors(place / CACHES_FILE, tensors, {"format_version": str(FORMAT_VERSION)})
    if isinstance(state.memory, ChunkMemory):
        state.memory.save(place / "memory")
    return {
        "positions": state.positions,
        "num_upper_past": state.num_upper_past,
        "carried": list(state.carried),
    }


def _load_row(model: HSATransformer, values: dict[str, Any], place: Path, memory: str) -> ModelState:
    path = place / CACHES_FILE
    tensors = {name: tensor.to(model.device) for name, tensor in read_tensors(path).items()}
    batch, config = len(values["positions"]), model.config
    weight = model.embedding.weight.detach()
    try:
        halves = {
            half: [
                _cache(empty, f"{half}.{i}", tensors)
                for i, empty in enumerate(model.empty_caches(getattr(model, half), batch))
            ]
            for half in ("lower", "upper")
        }
        carried = {layer: _selection(f"carried.{layer}", tensors, batch, config) for layer in values["carried"]}
        newest = _fitting(tensors, "newest", weight.new_empty(batch, config.embedding_window - 1, config.dim))
        pending = _fitting(tensors, "pending", weight.new_empty(batch, config.chunk_size - 1, config.dim))
    except KeyError as error:
        raise SaveError(f"{path} does not belong to {INDEX_FILE}: it lacks {error}") from error
    except ValueError as error:
        raise SaveError(f"{path} does not belong to {INDEX_FILE}: {error}") from error
    chunks = None
    if config.has_memory:
        chunks = ChunkMemory.load(place / "memory", device=model.device, placement=memory)
        if chunks.num_chunks != [position // config.chunk_size for position in values["positions"]]:
            raise SaveError(
                f"{place / 'memory'} holds {chunks.num_chunks} chunks; {INDEX_FILE} says that {values['positions']} "
                "tokens were read"
            )
    return ModelState(
        positions=values["positions"],
        lower=halves["lower"],
        upper=halves["upper"],
        num_upper_past=values["num_upper_past"],
        newest=newest,
        pending=pending,
        memory=chunks,
        carried=carried,
    )


def _cache(empty: Cache | None, name: str, tensors: dict[str, Tensor]) -> Cache | None:
    """Makes a cache of the kind of `empty`, or of None, from the tensors of that name."""
    if empty is None:
        return None
    return type(empty)(
        **{slot: _fitting(tensors, f"{name}.{slot}", getattr(empty, slot)) for slot in empty.__slots__}
    )  # fmt: skip


def _selection(name: str, tensors: dict[str, Tensor], batch: int, config: ModelConfig) -> Selection:
    indices, weights = tensors[f"{name}.indices"], tensors[f"{name}.weights"]
    shape = (batch, 1, config.memory_kv_heads, config.top_k)
    if indices.shape != shape or weights.shape != shape or indices.dtype != torch.int32:
        raise ValueError(f"{name} has shapes {list(indices.shape)} and {list(weights.shape)}, not {list(shape)}")
    return Selection(indices=indices, weights=weights)


def _fitting(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Returns the tensor of that name, which must be shaped like another; a size of 0 there may be any."""
    found = tensors[name]
    fits = found.dim() == like.dim() and all(n in (size, 0) for size, n in zip(found.shape, like.shape, strict=True))
    if found.dtype != like.dtype or not fits:
        raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, not {like.dtype} {list(like.shape)}")
    return found
