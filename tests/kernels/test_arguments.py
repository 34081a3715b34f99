"""What is wrong with the arguments of `hsa_attention` is said in one line."""

import pytest
import torch
from torch import Tensor

import hsa_compile
from hsa_compile import hsa_attention
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
        ({"k": torch.zeros(1, 32, 1, 8, device="meta")}, "k is on meta, q on cpu"),
        ({name: torch.zeros(1, n, 1, 300) for name, n in (("q", 4), ("k", 32), ("v", 32))}, "D = 300 .* 1 … 256"),
    ],
)  # fmt: skip
def test_bad_arguments_name_the_value_and_what_is_allowed(bad: dict, message: str) -> None:
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
