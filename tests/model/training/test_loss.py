"""The loss equals the plain one, in value and gradient, whatever the chunk."""

import pytest
import torch
import torch.nn.functional as F

from hsa_compile.model.training.step import weighted_cross_entropy

N, DIM, V = 13, 6, 11


def tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, DIM, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, DIM, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator, dtype=torch.float32)
    weights[3] = 0
    return hidden, weight, targets, weights


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_it_equals_the_plain_loss_in_value_and_gradient(chunk: int) -> None:
    hidden, weight, targets, weights = tensors()
    total, losses = weighted_cross_entropy(hidden, weight, targets, weights, chunk=chunk)
    grads = torch.autograd.grad(3 * total, (hidden, weight))

    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    expected = torch.autograd.grad(3 * (plain * weights).sum(), (hidden, weight))
    torch.testing.assert_close(losses, plain.detach())
    torch.testing.assert_close(total, (plain * weights).sum())
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    inputs = list(tensors())
    inputs[frozen] = inputs[frozen].detach()
    total, _ = weighted_cross_entropy(*inputs, chunk=5)
    total.backward()
    assert inputs[frozen].grad is None
    assert inputs[1 - frozen].grad is not None


def test_without_gradients_it_only_computes_the_loss() -> None:
    inputs = tensors()
    with torch.no_grad():
        total, losses = weighted_cross_entropy(*inputs, chunk=5)
    assert not total.requires_grad
    torch.testing.assert_close(total, (losses * inputs[3]).sum())


def test_bfloat16_is_summed_in_float32() -> None:
    hidden, weight, targets, weights = tensors(torch.float32)
    exact, _ = weighted_cross_entropy(hidden, weight, targets, weights, chunk=4)
    rough, losses = weighted_cross_entropy(
        hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16(), targets, weights, chunk=4
    )
    assert rough.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.03, atol=0.03)
    rough.backward()


def test_logits_of_more_than_a_chunk_never_exist() -> None:
    hidden, weight = torch.randn(512, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.numel())
            return out

    with Watch():
        total, _ = weighted_cross_entropy(hidden, weight, torch.zeros(512, dtype=torch.long), torch.ones(512), chunk=16)
        total.backward()
    assert max(largest) == 16 * 1000
