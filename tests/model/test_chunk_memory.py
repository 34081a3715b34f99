"""The chunk memory against the one-shot ops on everything it holds, in every placement and dtype."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsa_compile import hsa_attention, select_chunks
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.hsa_attention.reference import hsa_attention_reference
from hsa_compile.kernels.select_chunks.reference import select_chunks_reference
from hsa_compile.model.memory import attend as memory_attend
from hsa_compile.model.memory import landmarks as memory_landmarks
from hsa_compile.model.memory import pages as memory_pages
from hsa_compile.model.memory.memory import ChunkMemory

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

PLACEMENTS = ("device", "host", "disk")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
C, H, D, DV, DR, R = 3, 2, 8, 5, 6, 2


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments at a few chunks."""
    monkeypatch.setattr(memory_landmarks, "FIRST_SEGMENT_CHUNKS", 4)
    monkeypatch.setattr(memory_pages, "FIRST_SEGMENT_PAGES", 3)


@dataclass
class Text:
    """What a row of a memory should hold."""

    k: Tensor  # [N, C, H, D]
    v: Tensor
    landmarks: Tensor


def texts(counts: list[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Text]:
    """Whole numbers as landmarks, so that equal scores are equal however they are added up."""
    random = torch.Generator().manual_seed(seed)
    return [
        Text(
            torch.randn(n, C, H, D, generator=random).to(dtype),
            torch.randn(n, C, H, DV, generator=random).to(dtype),
            torch.randint(-2, 3, (n, R, H, DR), generator=random).to(dtype),
        )
        for n in counts
    ]


def memory_of(
    rows: list[Text], pieces: list[int] | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> ChunkMemory:
    """A memory that read the rows in pieces; shorter rows fall behind."""
    memory = ChunkMemory(
        batch=len(rows),
        num_kv_heads=H,
        head_dim=D,
        value_dim=DV,
        chunk_size=C,
        retrieval_dim=DR,
        landmarks_per_chunk=R,
        dtype=dtype,
        **options,
    )
    most = max(len(row.k) for row in rows)
    ends = [0, *(pieces or []), most]
    for first, last in pairwise(sorted(min(end, most) for end in ends)):
        counts = [max(0, min(len(row.k), last) - first) for row in rows]
        k, v, landmarks = (
            torch.stack([padded(x[first:last], last - first) for x in part])
            for part in ([r.k for r in rows], [r.v for r in rows], [r.landmarks for r in rows])
        )
        memory.append(k, v, landmarks, counts)
    assert memory.num_chunks == [len(row.k) for row in rows]
    return memory


def padded(x: Tensor, n: int) -> Tensor:
    """With NaN, which nobody may read."""
    return torch.cat((x, x.new_full((n - len(x), *x.shape[1:]), float("nan"))))


def whole(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_selects_as_one_shot(
    memory: ChunkMemory, rows: list[Text], query: Tensor, positions: list[int], **options: Any
) -> tuple[Tensor, Tensor]:
    indices, weights = memory.select(query, positions, **options)
    size = 1 if options.pop("once_a_chunk", False) else C
    assert indices.dtype == torch.int32
    assert weights.dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    for b, (row, position) in enumerate(zip(rows, positions, strict=True)):
        q, landmarks = query[b : b + 1], row.landmarks[None]
        one_indices, one_weights = select_chunks(q, landmarks, chunk_size=size, offset=position, **options)
        assert torch.equal(indices[b : b + 1], one_indices)
        torch.testing.assert_close(weights[b : b + 1], one_weights, atol=1e-6, rtol=0)
        exact = select_chunks_reference(q.double(), landmarks.double(), chunk_size=size, offset=position, **options)
        assert torch.equal(indices[b : b + 1], exact[0])
        torch.testing.assert_close(weights[b : b + 1].double(), exact[1], atol=1e-6, rtol=0)
    return indices, weights


def assert_attends_as_one_shot(
    memory: ChunkMemory, rows: list[Text], q: Tensor, indices: Tensor, weights: Tensor, **options: Any
) -> None:
    o = memory.attend(q, indices, weights, **options)
    assert o.dtype == q.dtype
    for b, row in enumerate(rows):
        k, v = row.k.flatten(0, 1)[None].to(q.dtype), row.v.flatten(0, 1)[None].to(q.dtype)
        inputs = q[b : b + 1], k, v, indices[b : b + 1], weights[b : b + 1]
        one_shot = hsa_attention(*inputs, chunk_size=C, **options)
        tolerance = TOLERANCES[q.dtype]
        torch.testing.assert_close(o[b : b + 1], one_shot, atol=tolerance, rtol=tolerance)
        if len(row.k):
            q64, k64, v64, i, w64 = (x.double() if x.is_floating_point() else x for x in inputs)
            exact = hsa_attention_reference(q64, k64, v64, i, w64, chunk_size=C, **options)
            torch.testing.assert_close(o[b : b + 1].double(), exact, atol=tolerance, rtol=tolerance)


@pytest.fixture(params=PLACEMENTS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {"placement": request.param, "directory": tmp_path}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 7, 23])
def test_pieces_and_unequal_rows_are_as_one_shot(place: dict[str, Any], dtype: torch.dtype, T: int) -> None:
    counts = [37, 0, 5, 22]
    rows = texts(counts, dtype)
    memory = memory_of(rows, [1, 8, 9, 30], dtype, **place)
    positions = [n * C + extra for n, extra in zip(counts, (0, 2, 1, 0), strict=True)]
    query, q = whole((4, T, H, DR), dtype), whole((4, T, 3 * H, D), dtype)
    indices, weights = assert_selects_as_one_shot(memory, rows, query, positions, top_k=5)
    assert_attends_as_one_shot(memory, rows, q, indices, weights)


@pytest.mark.parametrize("fusion", ["softmax", "stick_breaking"])
@pytest.mark.parametrize("T", [1, 4, 5, 60])
def test_tokens_see_the_chunks_before_them(fusion: str, T: int) -> None:
    rows = texts([19, 19])
    memory = memory_of(rows, [7])
    for position in (0, 2, 3, 11, 12, 13, 25, 57):
        query = whole((2, T, H, DR), seed=position)
        assert_selects_as_one_shot(memory, rows, query, [position] * 2, top_k=3, fusion=fusion)


@pytest.mark.parametrize("T", [1, 9])
def test_tokens_beyond_the_last_chunk_see_no_more_than_there_is(T: int) -> None:
    rows = texts([6, 13, 1])
    assert_selects_as_one_shot(memory_of(rows), rows, whole((3, T, H, DR)), [100, 10**9, 0], top_k=20)


def test_once_a_chunk_counts_positions_in_chunks() -> None:
    rows = texts([30, 11])
    memory, query = memory_of(rows), whole((2, 12, H, DR))
    assert_selects_as_one_shot(memory, rows, query, [18, 0], top_k=4, once_a_chunk=True)


@pytest.mark.parametrize("T", [1, 6])
def test_of_equal_chunks_the_lowest_win(T: int) -> None:
    rows = texts([50])
    rows[0].landmarks[:] = 1
    indices, _ = assert_selects_as_one_shot(memory_of(rows), rows, whole((1, T, H, DR)), [150], top_k=4)
    assert (indices == torch.tensor([3, 2, 1, 0])).all()


@pytest.mark.parametrize("T", [3, 40])
def test_random_scores_agree_with_one_shot(T: int) -> None:
    rows = texts([300])
    rows[0].landmarks[:] = torch.randn(300, R, H, DR)
    assert_selects_as_one_shot(memory_of(rows), rows, torch.randn(1, T, H, DR), [850], top_k=16)


def test_float64_stays_float64() -> None:
    rows = texts([20], torch.float64)
    memory = memory_of(rows, dtype=torch.float64)
    for T in (2, 20):
        query, q = whole((1, T, H, DR), torch.float64), torch.randn(1, T, 2 * H, D, dtype=torch.float64)
        found = assert_selects_as_one_shot(memory, rows, query, [60], top_k=3)
        assert_attends_as_one_shot(memory, rows, q, *found)


@pytest.mark.parametrize("T", [1, 16, 17, 45])
@pytest.mark.parametrize("per_head", [False, True], ids=["per-kv-head", "per-query-head"])
def test_attend_takes_any_slots(place: dict[str, Any], T: int, per_head: bool) -> None:
    """Duplicates, holes in the middle, tokens that chose nothing, int64."""
    rows = texts([11, 4])
    memory = memory_of(rows, **place)
    random = torch.Generator().manual_seed(T)
    indices = torch.stack([torch.randint(-1, n, (T, H, 6), generator=random) for n in (11, 4)])
    indices[:, T // 2] = -1
    weights = torch.randn(2, T, 4 * H if per_head else H, 6, generator=random)
    q = torch.randn(2, T, 4 * H, D, generator=random)
    assert_attends_as_one_shot(memory, rows, q, indices, weights)
    assert_attends_as_one_shot(
        memory, rows, q, indices, weights, scale=0.3, softmax_off_by_one=True, mask_last_token=True
    )


@pytest.mark.parametrize("T", [0, 1, 30])
def test_an_empty_memory_gives_zeros(T: int) -> None:
    memory = memory_of(texts([0, 0]))
    query, q = torch.randn(2, T, H, DR), torch.randn(2, T, H, D)
    indices, weights = memory.select(query, [0, 50], top_k=3)
    assert (indices == -1).all()
    assert (weights == 0).all()
    assert torch.equal(memory.attend(q, indices, weights), torch.zeros(2, T, H, DV))


def test_many_tokens_are_read_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_attend, "GATHER_BYTES", 5000)
    sizes = []
    read = memory_pages.PagePool.read

    def spied(self: Any, slots: Tensor, size: int, **options: Any) -> tuple[Tensor, Tensor]:
        sizes.append(size)
        return read(self, slots, size, **options)

    monkeypatch.setattr(memory_pages.PagePool, "read", spied)
    rows = texts([200])
    indices = torch.randint(-1, 200, (1, 100, H, 2), generator=torch.Generator().manual_seed(0))
    assert_attends_as_one_shot(memory_of(rows), rows, torch.randn(1, 100, H, D), indices, torch.rand(1, 100, H, 2))
    assert len(sizes) == 7
    assert max(sizes) <= 64


def test_only_chosen_chunks_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = texts([40])
    memory, asked = memory_of(rows), []
    read = memory_pages.PagePool.read

    def spied(self: Any, slots: Tensor, size: int, **options: Any) -> tuple[Tensor, Tensor]:
        asked.append((slots.tolist(), size))
        return read(self, slots, size, **options)

    monkeypatch.setattr(memory_pages.PagePool, "read", spied)
    indices = torch.tensor([[[7, 3, -1], [7, 7, 39]]] * 20)[None]
    memory.attend(torch.randn(1, 20, H, D), indices, torch.rand(1, 20, H, 3))
    assert asked == [([6, 14, 15, 79], 4)]  # heads of pages, each once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_may_serve_a_float32_model(place: dict[str, Any], dtype: torch.dtype) -> None:
    rows = texts([17])
    memory = memory_of(rows, [4], dtype, landmark_dtype=torch.float32, **place)
    indices, weights = assert_selects_as_one_shot(memory, rows, whole((1, 20, H, DR)), [51], top_k=3)
    stored = [Text(row.k.to(dtype).float(), row.v.to(dtype).float(), row.landmarks) for row in rows]
    assert_attends_as_one_shot(memory, stored, torch.randn(1, 20, H, D), indices, weights)


def test_overwrite_replaces_what_is_there(place: dict[str, Any]) -> None:
    rows, new = texts([13, 20]), texts([6], seed=9)[0]
    memory = memory_of(rows, [5], **place)
    memory.overwrite(1, 9, new.k, new.v, new.landmarks)
    for old, x in ((rows[1].k, new.k), (rows[1].v, new.v), (rows[1].landmarks, new.landmarks)):
        old[9:15] = x
    indices, weights = assert_selects_as_one_shot(memory, rows, whole((2, 3, H, DR)), [39, 60], top_k=20)
    assert_attends_as_one_shot(memory, rows, torch.randn(2, 3, H, D), indices, weights)


def test_growing_moves_nothing(place: dict[str, Any]) -> None:
    memory, row = memory_of(texts([3]), **place), texts([1])[0]

    def places() -> list[int]:
        tensors = [x for s in memory.pages._segments for x in (s.k, s.v)] + [x for _, x in memory.landmarks._segments]
        return [x.data_ptr() for x in tensors]

    known: set[int] = set(places())
    for _ in range(40):
        memory.append(row.k[None], row.v[None], row.landmarks[None])
        assert known <= set(places())
        known = set(places())
    assert len(memory.pages._segments) == 5  # 3, 3, 6, 12, 24


def test_nbytes_says_what_lies_where(place: dict[str, Any]) -> None:
    memory = memory_of(texts([6, 3]), dtype=torch.float16, **place)
    pages = 3 + 3 + 6
    expected = {"landmarks": 8 * 2 * R * H * DR * 2, "device": 0, "host": 0, "disk": 0}
    expected[place["placement"]] = pages * C * H * (D + DV) * 2
    assert dict(memory.nbytes) == expected


def test_a_file_has_no_name_and_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_pages, "RESIDENT_BYTES", 0)
    rows = texts([30])
    memory = memory_of(rows, placement="disk", directory=tmp_path)
    assert not list(tmp_path.iterdir())
    indices, weights = memory.select(whole((1, 2, H, DR)), [90], top_k=8)
    for _ in range(2):
        assert_attends_as_one_shot(memory, rows, torch.randn(1, 2, H, D), indices, weights)
    assert memory.pages._resident == 0


def test_a_full_disk_leaves_the_memory_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = texts([5])
    memory = memory_of(rows, placement="disk", directory=tmp_path)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            memory.append(rows[0].k[None], rows[0].v[None], rows[0].landmarks[None])
    assert memory.num_chunks == [5]
    more = texts([8], seed=4)[0]
    memory.append(more.k[None], more.v[None], more.landmarks[None])
    rows = [Text(*(torch.cat(pair) for pair in zip(_parts(rows[0]), _parts(more), strict=True)))]
    found = assert_selects_as_one_shot(memory, rows, whole((1, 1, H, DR)), [39], top_k=13)
    assert_attends_as_one_shot(memory, rows, torch.randn(1, 1, H, D), *found)


def _parts(text: Text) -> Iterator[Tensor]:
    yield from (text.k, text.v, text.landmarks)


SETTINGS = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SETTINGS
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    pieces=st.lists(st.integers(0, 40), max_size=4),
    T=st.sampled_from([1, 2, 4, 5, 11]),
    position=st.integers(0, 150),
    top_k=st.sampled_from([1, 4, 9]),
    fusion=st.sampled_from(["softmax", "stick_breaking"]),
    seed=st.integers(0, 99),
)
def test_any_history_selects_and_attends_as_one_shot(
    counts: list[int], pieces: list[int], T: int, position: int, top_k: int, fusion: str, seed: int
) -> None:
    rows = texts(counts, seed=seed)
    memory = memory_of(rows, pieces)
    positions = [(position * (b + 1)) % 160 for b in range(len(counts))]
    query = whole((len(counts), T, H, DR), seed=seed)
    indices, weights = assert_selects_as_one_shot(memory, rows, query, positions, top_k=top_k, fusion=fusion)
    assert_attends_as_one_shot(memory, rows, whole((len(counts), T, 2 * H, D), seed=seed), indices, weights)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "batch = 0"),
        ({"head_dim": 257}, "head_dim = 257 must be an integer in 1 … 256"),
        ({"chunk_size": 2.0}, "chunk_size = 2.0"),
        ({"landmarks_per_chunk": 3}, "landmarks_per_chunk = 3 is not one of 1, 2, 4, 8, 16"),
        ({"dtype": torch.int8}, r"dtype = torch\.int8 is not one of"),
        ({"placement": "moon"}, "placement = 'moon' is not one of device, host, disk"),
        ({"placement": "disk"}, "directory = None"),
    ],
)
def test_constructor_names_what_is_wrong(wrong: dict[str, Any], message: str) -> None:
    right = {"batch": 1, "num_kv_heads": H, "head_dim": D, "chunk_size": C, "retrieval_dim": DR}
    with pytest.raises(InvalidArgument, match=message):
        ChunkMemory(**{**right, **wrong})


def test_calls_name_what_is_wrong() -> None:
    memory, row = memory_of(texts([4])), texts([2])[0]
    one = [x[None] for x in _parts(row)]
    with pytest.raises(InvalidArgument, match=r"v is torch\.float32 \[1, 2, 3, 2, 8\]; floats \[1, 2, 3, 2, 5\]"):
        memory.append(one[0], one[0], one[2])
    with pytest.raises(InvalidArgument, match=r"counts = \[3\] must be 1 integers in 0 … 2"):
        memory.append(*one, counts=[3])
    with pytest.raises(InvalidArgument, match="first_chunk = 3 with 2 chunks must lie within the 4 chunks of row 0"):
        memory.overwrite(0, 3, *_parts(row))
    with pytest.raises(InvalidArgument, match="row = 1 must be in 0 … 0"):
        memory.overwrite(1, 0, *_parts(row))
    query = torch.randn(1, 1, H, DR)
    with pytest.raises(InvalidArgument, match=r"query has shape \[1, 1, 2, 5\]"):
        memory.select(query[..., 1:], [9], top_k=2)
    with pytest.raises(InvalidArgument, match=r"positions = \[-1\]"):
        memory.select(query, [-1], top_k=2)
    for top_k in (0, 129, True):
        with pytest.raises(InvalidArgument, match=f"top_k = {top_k} must be an integer in 1 … 128"):
            memory.select(query, [9], top_k=top_k)
    with pytest.raises(InvalidArgument, match="fusion = 'sum' is not one of"):
        memory.select(query, [9], top_k=2, fusion="sum")
    q, indices = torch.randn(1, 1, H, D), torch.full((1, 1, H, 2), 4)
    with pytest.raises(InvalidArgument, match=r"chunk_indices of row 0 holds 4; allowed are −1 \(empty\) … 3"):
        memory.attend(q, indices, torch.rand(1, 1, H, 2))
    with pytest.raises(InvalidArgument, match=r"q has shape \[1, 1, 1, 8\]"):
        memory.attend(q[:, :, :1], indices - 1, torch.rand(1, 1, H, 2))
    with pytest.raises(InvalidArgument, match=r"chunk_weights has shape \[1, 1, 2, 3\]"):
        memory.attend(q, indices - 1, torch.rand(1, 1, H, 3))
