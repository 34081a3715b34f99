"""What autocast leaves alone on a CPU, where attention and the memory's kernels are for float32."""

import pytest
import torch
from small_models import build, small_config

from hsa_compile.model.layers.attention import attend
from hsa_compile.model.layers.basic import without_cpu_autocast
from hsa_compile.model.layers.hs_attention import Selection


def test_under_autocast_on_a_cpu_tensors_become_float32_and_products_stay_so() -> None:
    a, b = torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        context, (a32, b32) = without_cpu_autocast(a, b)
        with context:
            product = a32 @ b32
        assert (a32 @ b32).dtype == torch.bfloat16  # the context has ended
    assert product.dtype == torch.float32
    assert torch.equal(product, a.float() @ b)


def test_without_autocast_tensors_stay_what_they_are() -> None:
    a = torch.randn(3, dtype=torch.bfloat16)
    _, (same,) = without_cpu_autocast(a)
    assert same is a


def test_attention_under_autocast_is_that_of_float32() -> None:
    q, k, v = (torch.randn(2, 7, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    expected = attend(q, k, v, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        o = attend(q, k, v, is_causal=True)
    assert torch.equal(o, expected)
    for grad, other in zip(*(torch.autograd.grad(y.sum(), (q, k, v)) for y in (o, expected)), strict=True):
        assert torch.equal(grad, other)


@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
def test_a_model_under_autocast_is_near_the_one_without_and_chooses_chunks_in_float32(variant: str) -> None:
    model = build(small_config(variant)).eval()
    tokens = torch.randint(256, (2, 61), generator=torch.Generator().manual_seed(0)) % model.config.vocab_size
    selections: list[Selection] = []
    with torch.no_grad():
        expected = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(tokens, selections=selections)
    # Here and there the rounding below lets another chunk be chosen.
    assert (found.float() - expected).abs().median() < 0.03 * expected.abs().median()
    assert all(selection.weights.dtype == torch.float32 for selection in selections)
    assert bool(selections) == model.config.has_memory
