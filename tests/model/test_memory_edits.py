"""Chunks of the memory are read back, dropped and put in again, wherever they lie."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.memory import landmarks as memory_landmarks
from hsa_compile.model.memory import pages as memory_pages
from hsa_compile.model.memory.memory import ChunkMemory

C, H, D, DV, DR, R = 3, 2, 8, 5, 6, 2
PLACEMENTS = ("device", "host", "disk")


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments at a few chunks."""
    monkeypatch.setattr(memory_landmarks, "FIRST_SEGMENT_CHUNKS", 4)
    monkeypatch.setattr(memory_pages, "FIRST_SEGMENT_PAGES", 3)


def chunks(n: int, seed: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = ((batch, n, C, H, D), (batch, n, C, H, DV), (batch, n, R, H, DR))
    k, v, landmarks = (torch.randn(shape, generator=random) for shape in shapes)
    return k, v, landmarks


def empty(batch: int = 1, **options: object) -> ChunkMemory:
    sizes = {"num_kv_heads": H, "head_dim": D, "value_dim": DV, "chunk_size": C, "retrieval_dim": DR}
    return ChunkMemory(batch=batch, landmarks_per_chunk=R, **sizes, **options)


def assert_holds(memory: ChunkMemory, row: int, first: int, expected: tuple[Tensor, ...]) -> None:
    found = memory.read(row, first, first + len(expected[0]))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_is_read_can_be_put_back(placement: str, tmp_path: Path) -> None:
    memory = empty(batch=2, placement=placement, directory=tmp_path)
    first, more = chunks(7, 0, batch=2), chunks(6, 1, batch=2)
    memory.append(*first)
    memory.append(*more, counts=[6, 2])
    before = memory.read(0, 5, 10)
    assert_holds(memory, 0, 5, tuple(torch.cat((a[0, 5:], b[0, :3])) for a, b in zip(first, more, strict=True)))
    assert_holds(memory, 1, 6, tuple(torch.cat((a[1, 6:], b[1, :2])) for a, b in zip(first, more, strict=True)))
    memory.overwrite(0, 5, *(x[0] for x in chunks(5, 2)))
    assert not torch.equal(memory.read(0, 5, 10)[0], before[0])
    memory.overwrite(0, 5, *before)
    assert_holds(memory, 0, 5, before)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dropped_chunks_make_room_for_others(placement: str, tmp_path: Path) -> None:
    memory = empty(placement=placement, directory=tmp_path)
    memory.append(*chunks(10, 0))
    pages = memory.pages.num_pages
    for seed in range(1, 5):
        memory.truncate([6])
        assert memory.num_chunks == [6]
        new = chunks(4, seed)
        memory.append(*new)
        assert_holds(memory, 0, 6, tuple(x[0] for x in new))
    assert_holds(memory, 0, 0, tuple(x[0, :6] for x in chunks(10, 0)))
    assert memory.pages.num_pages == pages


@pytest.mark.parametrize("kept", [(4, 1), (1, 4)], ids=["of the newest pages", "of older ones"])
def test_rows_drop_as_many_as_they_are_told(kept: tuple[int, int]) -> None:
    memory = empty(batch=2)
    first, more = chunks(4, 0, batch=2), chunks(3, 1, batch=2)
    memory.append(*first)
    memory.truncate(kept)
    memory.append(*more)
    assert memory.num_chunks == [count + 3 for count in kept]
    for row, count in enumerate(kept):
        parts = zip(first, more, strict=True)
        assert_holds(memory, row, 0, tuple(torch.cat((a[row, :count], b[row])) for a, b in parts))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_save_stays_as_it_is_when_its_chunks_are_dropped(placement: str, tmp_path: Path) -> None:
    memory = empty()
    saved, new = chunks(5, 0), chunks(4, 1)
    memory.append(*saved)
    memory.save(tmp_path / "save")
    loaded = ChunkMemory.load(tmp_path / "save", placement=placement)
    loaded.truncate([2])
    loaded.append(*new)
    assert_holds(loaded, 0, 0, tuple(torch.cat((a[0, :2], b[0])) for a, b in zip(saved, new, strict=True)))
    assert_holds(ChunkMemory.load(tmp_path / "save"), 0, 0, tuple(x[0] for x in saved))


def test_what_is_not_there_is_named() -> None:
    memory = empty()
    memory.append(*chunks(5, 0))
    with pytest.raises(InvalidArgument, match=r"chunks 3 … 5 must be some of the 5 of row 0"):
        memory.read(0, 3, 6)
    with pytest.raises(InvalidArgument, match=r"row = 1 must be in 0 … 0"):
        memory.read(1, 0, 1)
    for counts in ([6], [-1], [1, 1]):
        with pytest.raises(InvalidArgument, match="counts = "):
            memory.truncate(counts)
