"""Going back to where a state stood, and reading on from it in several ways: snapshots, and states of some rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.inference.inference import ModelState
from hsa_compile.model.transformer import HSATransformer


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Notes where a state stood. Nothing large is copied: reading on makes new caches, and the memory only grows.

    Attributes:
        state: the small parts of the state.
        num_chunks: how many chunks each row of its memory has.
        rows: the snapshots of its rows, if the state has rows of its own.
    """

    state: ModelState
    num_chunks: tuple[int, ...]
    rows: tuple["Snapshot", ...]


def snapshot(state: ModelState) -> Snapshot:
    """Takes a point to which `rewind` goes back, for as long as chunks that are there now are not overwritten."""
    return Snapshot(
        state=_copy(state),
        num_chunks=tuple(state.memory.num_chunks) if state.memory is not None else (),
        rows=tuple(snapshot(row) for row in state.rows or ()),
    )


def rewind(state: ModelState, point: Snapshot) -> None:
    """Makes a state what it was; one can go back to a point many times.

    Args:
        state: the state that the point was taken from, and that has read on since.
        point: what `snapshot` returned for it.
    """
    before = _copy(point.state)
    state.positions, state.num_upper_past = before.positions, before.num_upper_past
    state.lower, state.upper, state.newest, state.pending = before.lower, before.upper, before.newest, before.pending
    state.carried = before.carried
    if state.memory is not None:
        state.memory.truncate(point.num_chunks)
    for row, row_point in zip(state.rows or (), point.rows, strict=True):
        rewind(row, row_point)


def take_rows(model: HSATransformer, state: ModelState, rows: Sequence[int]) -> ModelState:
    """Returns a state of some of the texts, each as often as it is named; both states read on without the other.

    Args:
        model: the model that has read.
        state: what it has read; it is not changed, and its chunks are not copied.
        rows: the numbers of the texts, at least one.

    Raises:
        InvalidArgument: a row is not there, or none is named.
    """
    batch = len(state.rows) if state.rows is not None else len(state.positions)
    if not rows or not all(0 <= row < batch for row in rows):
        raise InvalidArgument(f"rows = {list(rows)} must be at least one of 0 … {batch - 1}")
    if model.config.has_landmark_tokens and len(rows) > 1:
        states = [take_rows(model, state, [row]) for row in rows]
        return replace(states[0], rows=states)
    if state.rows is not None:
        return take_rows(model, state.rows[rows[0]], [0])
    index = torch.tensor(rows, device=state.pending.device)
    return replace(
        state,
        positions=[state.positions[row] for row in rows],
        lower=[_rows_of(cache, index) for cache in state.lower],
        upper=[_rows_of(cache, index) for cache in state.upper],
        num_upper_past=[state.num_upper_past[row] for row in rows],
        newest=state.newest[index],
        pending=state.pending[index],
        memory=None if state.memory is None else state.memory.take(rows),
        carried={layer: _rows_of(selection, index) for layer, selection in state.carried.items()},
    )


def _rows_of(parts: Any, index: Tensor) -> Any:
    """Takes rows of each tensor of a cache or a selection; None stays None, also within."""
    if parts is None:
        return None
    tensors = {name: getattr(parts, name) for name in parts.__slots__}
    return type(parts)(**{name: tensor if tensor is None else tensor[index] for name, tensor in tensors.items()})


def _copy(state: ModelState) -> ModelState:
    return replace(
        state,
        positions=list(state.positions),
        lower=list(state.lower),
        upper=list(state.upper),
        num_upper_past=list(state.num_upper_past),
        carried=dict(state.carried),
    )
