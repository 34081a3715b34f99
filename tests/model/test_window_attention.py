"""Sliding windows: the blocked and the Flex formulation against a dense mask in float64."""

import pytest
import torch
from small_models import combinations
from torch import Tensor
from torch.nn import functional

from hsa_compile.model.layers.window_attention import alibi_slopes, flex_window_attention, window_attention

SHAPES = [  # T, past, window
    (1, 0, 5),
    (1, 4, 5),
    (1, 9, 5),
    (3, 0, 1),
    (31, 6, 7),
    (33, 0, 7),
    (64, 31, 32),
    (200, 0, 32),
    (200, 77, 32),
    (150, 149, 150),
    (517, 0, 300),
    (40, 0, 10**9),  # nothing is made for what is not there
]


def dense(q: Tensor, k: Tensor, v: Tensor, window: int, num_past: Tensor | None, slopes: Tensor | None) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    distance = torch.arange(T)[:, None] + S - T - torch.arange(S)
    hidden = ((distance < 0) | (distance >= window))[None].expand(q.shape[0], T, S)
    if num_past is not None:
        hidden = hidden | (torch.arange(S) < (S - T - num_past)[:, None])[:, None]
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[3] ** -0.5
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1), v)


def tensors(T: int, past: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((2, T, 6, 8), (2, past + T, 3, 8), (2, past + T, 3, 8))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("shape", "bias"), combinations(SHAPES, ["none", "alibi"]))
def test_blocks_give_output_and_gradients_of_the_dense_mask(shape: tuple[int, int, int], bias: str) -> None:
    T, past, window = shape
    q, k, v = tensors(T, past)
    slopes = alibi_slopes(6, q.device) if bias == "alibi" else None
    for num_past in (None, torch.tensor([past // 2, past])):
        expected = dense(q, k, v, window, num_past, slopes)
        o = window_attention(q, k, v, window=window, num_past=num_past, slopes=slopes)
        assert (o - expected).abs().max() < 2e-5
        weights = torch.randn_like(o)
        mine = torch.autograd.grad((o * weights).sum(), (q, k, v))
        theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
        for one, other in zip(mine, theirs, strict=True):
            assert (one - other).abs().max() < 5e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("bias", ["alibi", pytest.param("none", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    ("T", "past", "window"),
    [(31, 20, 16), *(pytest.param(*s, marks=pytest.mark.exhaustive) for s in ((200, 0, 32), (200, 77, 32)))],
)
@pytest.mark.slow
def test_flex_attention_gives_the_same(T: int, past: int, window: int, bias: str) -> None:
    q, k, v = (x.detach() for x in tensors(T, past))
    slopes = alibi_slopes(6, q.device) if bias == "alibi" else None
    for num_past in (None, torch.tensor([past // 2, past])):
        o = flex_window_attention(q, k, v, window=window, num_past=num_past, slopes=slopes, compiled=False)
        assert (o - dense(q, k, v, window, num_past, slopes)).abs().max() < 2e-5


def test_cost_is_linear_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: the products of queries and keys a token."""
    products = []
    attend = functional.scaled_dot_product_attention

    def counting(q: Tensor, k: Tensor, *rest: Tensor, **options: object) -> Tensor:
        products.append(q.shape[:-1].numel() * k.shape[-2])
        return attend(q, k, *rest, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counting)
    for T in (1024, 4096):
        window_attention(*(x.detach() for x in tensors(T, 0)), window=32)
    assert products[1] == 4 * products[0]
    assert products[0] <= 2 * 6 * 1024 * 2 * 32
