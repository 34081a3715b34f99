"""Going back in a text: several continuations share what was read before them."""

from dataclasses import dataclass, replace

from hsa_compile.model.inference import ModelState


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Where a state stood. Nothing large is copied: reading on makes new caches, and the memory only grows.

    Attributes:
        state: the small parts of it.
        num_chunks: of each row of its memory.
        rows: of a state that has rows of its own.
    """

    state: ModelState
    num_chunks: tuple[int, ...]
    rows: tuple["Snapshot", ...]


def snapshot(state: ModelState) -> Snapshot:
    """A point to which `rewind` goes back, for as long as chunks that are there now are not overwritten."""
    return Snapshot(
        state=_copy(state),
        num_chunks=tuple(state.memory.num_chunks) if state.memory is not None else (),
        rows=tuple(snapshot(row) for row in state.rows or ()),
    )


def rewind(state: ModelState, point: Snapshot) -> None:
    """Makes a state what it was; a point can be gone back to many times.

    Args:
        state: that the point was taken of, read on since.
        point: of it.
    """
    before = _copy(point.state)
    state.positions, state.num_upper_past = before.positions, before.num_upper_past
    state.lower, state.upper, state.pending = before.lower, before.upper, before.pending
    state.carried = before.carried
    if state.memory is not None:
        state.memory.truncate(point.num_chunks)
    for row, row_point in zip(state.rows or (), point.rows, strict=True):
        rewind(row, row_point)


def _copy(state: ModelState) -> ModelState:
    return replace(
        state,
        positions=list(state.positions),
        lower=list(state.lower),
        upper=list(state.upper),
        num_upper_past=list(state.num_upper_past),
        carried=dict(state.carried),
    )
