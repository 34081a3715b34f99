"""What is wrong with the arguments of `hsa_attention` is said in one line."""

import pytest
import torch
from torch import Tensor

import hsa_compile
from hsa_compile import hsa_attention, select_chunks
from hsa_compile.errors import InvalidArgument

Q, INDICES, WEIGHTS = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 1, 2, dtype=torch.int32), torch.ones(1, 4, 1, 2)
GOOD = {
    "q": Q, "k": torch.zeros(1, 32, 1, 8), "v": torch.zeros(1, 32, 1, 8), "chunk_indices": INDICES,
    "chunk_weights": WEIGHTS, "chunk_size": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": [1, 2]}, "q is a list"),
        ({"q": torch.zeros(4, 2, 8)}, r"q has shape \[4, 2, 8\]; four dimensions"),
        ({"q": torch.zeros(1, 4, 2, 8, dtype=torch.int32)}, "q has dtype torch.int32; .* float32"),
        ({"k": torch.zeros(1, 32, 1, 8).half()}, "k has dtype torch.float16; q, k and v must share"),
        ({"k": torch.zeros(1, 32, 1, 9)}, r"k has shape \[1, 32, 1, 9\]; .* \[1, 32, 1, 8\]"),
        ({"v": torch.zeros(1, 31, 1, 8)}, r"v has shape \[1, 31, 1, 8\]; .* \[1, 32, 1, 8\]"),
        ({"q": torch.zeros(1, 4, 3, 8), "k": torch.zeros(1, 32, 2, 8), "v": torch.zeros(1, 32, 2, 8)},
         "3 heads.*multiple of the 2"),
        ({"chunk_indices": torch.zeros(1, 5, 1, 2, dtype=torch.int32)}, r"chunk_indices has shape \[1, 5, 1, 2\]"),
        ({"chunk_indices": INDICES.short()}, "chunk_indices has dtype torch.int16; int32 or int64"),
        ({"chunk_indices": INDICES + 2}, "chunk_indices holds 2; allowed are -1 .* 0 … 1"),
        ({"chunk_indices": INDICES - 2}, "chunk_indices holds -2; allowed are -1"),
        ({"chunk_weights": torch.ones(1, 4, 1, 3)}, r"chunk_weights has shape \[1, 4, 1, 3\]"),
        ({"chunk_weights": torch.ones(1, 4, 1, 2).int()}, "chunk_weights has dtype torch.int32; a float"),
        ({"chunk_size": 0}, "chunk_size = 0 must be an integer in 1 …"),
        ({"chunk_size": 16.0}, "chunk_size = 16.0 must be an integer"),
        ({"scale": "big"}, "scale = 'big'"),
        ({"scale": float("nan")}, "scale = nan"),
        ({"scale": 10**400}, "scale = an integer of more than 200 digits must be a finite number"),
        ({"scale": -(10**5000)}, "scale = an integer of more than 200 digits must be a finite number"),
        ({"softmax_off_by_one": 1}, "softmax_off_by_one = 1 must be True or False"),
        ({"mask_last_token": None}, "mask_last_token = None must be True or False"),
        ({"deterministic": "no"}, "deterministic = 'no' must be True or False"),
        ({"k": torch.zeros(1, 15, 1, 8), "v": torch.zeros(1, 15, 1, 8)},
         r"chunk_indices holds 0; allowed are -1 \(empty\) alone, no whole chunk of 15 keys"),
        ({"cu_seqlens": [0, 4]}, "cu_seqlens is a list, not a tensor"),
        ({"k": torch.zeros(1, 32, 1, 8, device="meta")}, "k is on meta, q on cpu"),
        ({name: torch.zeros(1, n, 1, 300) for name, n in (("q", 4), ("k", 32), ("v", 32))}, "D = 300 .* 1 … 256"),
    ],
)  # fmt: skip
def test_bad_arguments_name_the_value_and_what_is_allowed(bad: dict, message: str) -> None:
    if "cu_seqlens" in bad:
        bad = {**bad, "k": torch.zeros(1, 4, 1, 8), "v": torch.zeros(1, 4, 1, 8)}
    with pytest.raises(InvalidArgument, match=message) as caught:
        hsa_attention(**{**GOOD, **bad})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, hsa_compile.HSACompileError)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 4]), "a batch of 1 and T = S; B = 1, T = 4, S = 32"),
        (torch.tensor([[0, 32]]), r"shape \[1, 2\]"),
        (torch.tensor([0.0, 32.0]), "dtype torch.float32"),
        (torch.tensor([0, 40]), r"\[0, 40\] must rise from 0 to T = 32"),
        (torch.tensor([0, 20, 10, 32]), r"\[0, 20, 10, 32\] must rise"),
    ],
)
def test_bad_cu_seqlens_are_named(cu_seqlens: Tensor, message: str) -> None:
    T = 4 if "T = 4" in message else 32
    q = torch.zeros(1, T, 1, 8)
    k = torch.zeros(1, 32, 1, 8)
    with pytest.raises(InvalidArgument, match=message):
        hsa_attention(
            q, k, k, torch.zeros(1, T, 1, 1, dtype=torch.int32), torch.ones(1, T, 1, 1), chunk_size=8,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip


def test_bad_cu_seqlens_are_named_where_there_is_no_whole_chunk() -> None:
    x = torch.zeros(1, 4, 1, 8)
    picks, weights = torch.zeros(1, 4, 1, 1, dtype=torch.int32), torch.ones(1, 4, 1, 1)
    with pytest.raises(InvalidArgument, match=r"\[3, 99\] must rise from 0 to T = 4"):
        hsa_attention(x, x, x, picks, weights, chunk_size=8, cu_seqlens=torch.tensor([3, 99]))


@pytest.mark.parametrize("chunk", [2, 99, -5])
@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
def test_a_chunk_that_a_packed_sequence_lacks_is_an_empty_slot(chunk: int) -> None:
    x = torch.ones(1, 32, 1, 8)
    picks = torch.full((1, 32, 1, 1), chunk, dtype=torch.int32)
    assert not hsa_attention(x, x, x, picks, picks + 1.0, chunk_size=8, cu_seqlens=torch.tensor([0, 16, 32])).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deterministic": 1}, "deterministic = 1 must be True or False"),
        ({"deterministic": None}, "deterministic = None must be True or False"),
        ({"noise_seed": 10**5000}, "noise_seed = an integer of more than 200 digits must be an integer in 0"),
    ],
)
def test_bad_options_of_selection_are_named(options: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        select_chunks(torch.zeros(1, 9, 1, 8), torch.zeros(1, 2, 1, 8), chunk_size=4, top_k=1, **options)


PICKS = torch.zeros(1, 32, 1, 1, dtype=torch.int32)
X, PAGES = torch.zeros(1, 32, 1, 8), torch.zeros(4, 1, 8, 8)
HSA = (X, X, X, PICKS, torch.ones(1, 32, 1, 1))
OPTIONS = (8, 1.0, False, False, False)
DECODE = (X[:, :1], PAGES, PAGES, PICKS[:, :1], torch.ones(1, 1, 1, 1))
STARTS = torch.tensor([0, 8, 16, 10**9], dtype=torch.int32)
raw = torch.ops.hsa_compile


def replaced(given: tuple, place: int, x: object) -> tuple:
    return (*given[:place], x, *given[place + 1 :])


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (raw.hsa_forward, (*replaced(HSA, 1, X[:, :, :, :7]), None, *OPTIONS), "k has shape"),
        (raw.hsa_forward, (*replaced(HSA, 3, PICKS[0]), None, *OPTIONS), "four dimensions"),
        (raw.hsa_forward, (*replaced(HSA, 3, PICKS + 4), None, *OPTIONS), "chunk_indices holds 4"),
        (raw.hsa_forward, (*HSA, None, 0, *OPTIONS[1:]), "chunk_size = 0"),
        (raw.hsa_forward, (*HSA, STARTS, *OPTIONS), "chunk_starts holds 1000000000; allowed are rows 0 … 24"),
        (raw.hsa_forward, (*HSA, STARTS.long(), *OPTIONS), "chunk_starts has .*int64"),
        (raw.hsa_backward, (*HSA, None, X[:, 1:], *OPTIONS), "grad_o has shape"),
        (raw.hsa_backward, (*replaced(HSA, 3, PICKS + 4), None, X, *OPTIONS), "chunk_indices holds 4"),
        (raw.select_chunks, (X, PAGES[:1, 0, :, None, 1:], 1, 8, 1, 0, "softmax", None, False), "landmarks has shape"),
        (raw.select_chunks, (X, X[:, 1:], 2, 8, 1, 0, "softmax", None, False), "31 landmarks; a multiple of 2"),
        (raw.select_chunks, (X, X, 0, 8, 1, 0, "softmax", None, False), "landmarks_per_chunk = 0 is not one of 1, 2"),
        (raw.select_chunks, (X, X, 1, 1, 129, 0, "softmax", None, False), "top_k = 129"),
        (raw.select_chunks, (X, X, 1, 1, 1, -9, "softmax", None, False), "offset = -9"),
        (raw.select_chunks_backward, (X, X, PICKS[:, 1:], HSA[4], 1, 1, "softmax", False), "landmark_indices has"),
        (raw.select_chunks_backward, (X, X, PICKS + 32, HSA[4], 1, 1, "softmax", False), "landmark_indices holds 32"),
        (raw.hsa_decode, (*replaced(DECODE, 2, PAGES[:3]), None, 1.0, False, False), "v_chunks has shape"),
        (raw.hsa_decode, (*DECODE, torch.zeros(2, 4).int(), 1.0, False, False), "page_table has shape"),
        (raw.sequence_bounds, (torch.tensor([[0, 32]]), 32), "cu_seqlens has shape"),
    ],
)
def test_the_operators_themselves_refuse_what_does_not_fit(op: object, arguments: tuple, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        op(*arguments)


class Packed(torch.nn.Module):
    def forward(self, cu_seqlens: Tensor) -> Tensor:
        return hsa_attention(*HSA, chunk_size=8, cu_seqlens=cu_seqlens)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["compiled", "exported"])
def test_bad_cu_seqlens_are_refused_where_python_no_longer_runs(how: str) -> None:
    good = torch.tensor([0, 12, 32])
    if how == "compiled":
        torch._dynamo.reset()
        packed = torch.compile(Packed(), backend="aot_eager", fullgraph=True)
    else:
        packed = torch.export.export(Packed(), (good,)).module()
    for bad in ([0, 900, 32], [0, 20, 31], [-1, 20, 32]):
        with pytest.raises(InvalidArgument, match="must rise from 0 to T = 32"):
            packed(torch.tensor(bad))
