"""Mamba-2: the chunked scan equals the recurrence written step by step, in one piece, in many, and padded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.layers.mamba2 import Mamba2, Mamba2State, ssd_scan

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
LENGTHS = [1, 2, 3, 63, 64, 65, 131, 200]


def make_layer(dtype: torch.dtype = torch.float32, **sizes: int) -> Mamba2:
    torch.manual_seed(0)
    layer = Mamba2(12, **{"state_dim": 5, "head_dim": 8, **sizes})
    layer.reset_parameters(std=0.4)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 1.5)
        layer.D.uniform_(-1, 1)
        layer.dt_bias.uniform_(-4, 1)
    return layer.to(dtype)


def reference(layer: Mamba2, x: Tensor) -> Tensor:
    """The published layer as a loop over tokens; needs only the weights of `layer`."""
    y = []
    width, inner, states = layer.conv1d.kernel_size[0], layer.out_proj.in_features, layer.state_dim
    past = [torch.zeros(x.shape[0], layer.conv1d.in_channels, dtype=x.dtype) for _ in range(width - 1)]
    h = torch.zeros(x.shape[0], layer.A_log.numel(), layer.head_dim, states, dtype=x.dtype)
    for token in x.unbind(1):
        z, now, dt = torch.split(token @ layer.in_proj.weight.T, [inner, inner + 2 * states, h.shape[1]], dim=1)
        past.append(now)
        mixed = layer.conv1d.bias + sum(past[-width:][k] * layer.conv1d.weight[:, 0, k] for k in range(width))
        u, b, c = torch.split(F.silu(mixed), [inner, states, states], dim=1)
        u = u.view(-1, h.shape[1], layer.head_dim)
        dt = F.softplus(dt + layer.dt_bias)
        h = h * torch.exp(-dt * layer.A_log.exp())[:, :, None, None]
        h = h + torch.einsum("bh,bhp,bn->bhpn", dt, u, b)
        out = (torch.einsum("bhpn,bn->bhp", h, c) + layer.D[:, None] * u).flatten(1) * F.silu(z)
        out = out * torch.rsqrt(out.square().mean(dim=1, keepdim=True) + layer.norm.eps) * layer.norm.weight
        y.append(out @ layer.out_proj.weight.T)
    return torch.stack(y, dim=1)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().clamp_min(1).item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_output_equals_the_recurrence(num_tokens: int, dtype: torch.dtype) -> None:
    layer = make_layer(dtype)
    x = torch.randn(2, num_tokens, 12, dtype=dtype)
    y, state = layer(x)
    assert (y.dtype, state.conv.dtype) == (dtype, dtype)
    assert state.ssm.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(y, reference(copy.deepcopy(layer).double(), x.double()), dtype)


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 150])
def test_gradients_equal_those_of_the_recurrence(num_tokens: int) -> None:
    layer = make_layer()
    exact = copy.deepcopy(layer).double()
    x = torch.randn(2, num_tokens, 12, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    seed = torch.randn(2, num_tokens, 12)
    actual = torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], seed)
    expected = torch.autograd.grad(reference(exact, exact_x), [exact_x, *exact.parameters()], seed.double())
    for name, a, e in zip(["x", *dict(layer.named_parameters())], actual, expected, strict=True):
        scale = e.abs().max().clamp_min(1)
        assert (a - e).abs().max() <= 2e-5 * scale, name


def test_gradients_flow_through_the_state() -> None:
    layer = make_layer(torch.float64)
    x = torch.randn(2, 90, 12, dtype=torch.float64, requires_grad=True)
    _, state = layer(x[:, :50])
    second, _ = layer(x[:, 50:], state)
    (actual,) = torch.autograd.grad(second.square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x)[0][:, 50:].square().sum(), x)
    assert actual[:, :50].abs().max() > 1e-3
    assert_close(actual, expected, torch.float64)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 100])
def test_pieces_give_the_same_as_one(size: int) -> None:
    layer = make_layer()
    x = torch.randn(2, 203, 12)
    with torch.no_grad():
        whole, end = layer(x)
        state, parts = None, []
        for piece in x.split(size, dim=1):
            y, state = layer(piece, state)
            parts.append(y)
    assert_close(torch.cat(parts, dim=1), whole, torch.float32)
    assert state is not None
    assert_close(state.ssm, end.ssm, torch.float32)
    assert_close(state.conv, end.conv, torch.float32)


def test_without_gradients_the_output_is_the_same() -> None:
    layer, x = make_layer(), torch.randn(2, 70, 12)
    with torch.no_grad():
        y, _ = layer(x)
    assert_close(y, layer(x)[0], torch.float32)


def test_passes_over_few_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer(torch.float64), torch.randn(2, 203, 12, dtype=torch.float64)
    expected, end = layer(x)
    monkeypatch.setattr("hsa_compile.model.layers.mamba2.PAIRS_PER_PASS_CPU", 1)
    y, state = layer(x)
    assert_close(y, expected, torch.float64)
    assert_close(state.ssm, end.ssm, torch.float64)


def test_an_empty_piece_changes_nothing() -> None:
    layer = make_layer()
    _, state = layer(torch.randn(2, 9, 12))
    y, after = layer(torch.randn(2, 0, 12), state)
    assert y.shape == (2, 0, 12)
    assert torch.equal(after.ssm, state.ssm)
    assert torch.equal(after.conv, state.conv)
    y, start = layer(torch.randn(2, 0, 12))
    assert not start.ssm.any()
    assert not start.conv.any()


@pytest.mark.parametrize("num_tokens", [1, 5, 100])
@pytest.mark.parametrize("from_state", [False, True])
def test_padding_leaves_the_state_and_the_other_tokens_as_they_are(num_tokens: int, from_state: bool) -> None:
    layer = make_layer()
    num_valid = torch.tensor([num_tokens, num_tokens // 2, min(2, num_tokens), 0])
    before = layer(torch.randn(4, 10, 12))[1] if from_state else None
    x = torch.randn(4, num_tokens, 12)
    y, state = layer(x, before, num_valid)
    for row, length in enumerate(num_valid.tolist()):
        own = None if before is None else Mamba2State(conv=before.conv[[row]], ssm=before.ssm[[row]])
        alone, end = layer(x[[row], :length], own)
        assert_close(y[[row], :length], alone, torch.float32)
        assert_close(state.ssm[[row]], end.ssm, torch.float32)
        assert_close(state.conv[[row]], end.conv, torch.float32)


def test_no_token_sees_a_later_one() -> None:
    layer = make_layer()
    x = torch.randn(1, 130, 12)
    changed = x.clone()
    changed[:, 70] += 1
    y, other = layer(x)[0], layer(changed)[0]
    assert torch.equal(y[:, :70], other[:, :70])
    assert (y[:, 70:] - other[:, 70:]).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1e2, 1e3])
def test_large_inputs_stay_exact_and_finite(scale: float) -> None:
    layer = make_layer()
    x = scale * torch.randn(2, 131, 12)
    x.requires_grad_()
    y, state = layer(x)
    exact = reference(copy.deepcopy(layer).double(), x.double())
    assert_close(y, exact, torch.float32)
    y.sum().backward()
    assert state.ssm.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_small_steps_after_a_large_one_keep_their_decay() -> None:
    # One step that forgets everything, then tiny ones: float32 sums from the chunk's start would lose the tiny ones.
    torch.manual_seed(0)
    dt = torch.full((1, 64, 1), 1e-4)
    dt[:, 3] = 2e4
    x, B, C = torch.randn(1, 64, 1, 4), torch.randn(1, 64, 3), torch.randn(1, 64, 3)
    A, state = torch.tensor([-8.0]), torch.zeros(1, 1, 4, 3)
    y, _ = ssd_scan(x, dt, A, B, C, state, 64)
    h, expected = torch.zeros(4, 3, dtype=torch.float64), []
    for t in range(64):
        h = h * torch.exp(dt[0, t].double() * -8) + dt[0, t] * torch.outer(x[0, t, 0], B[0, t]).double()
        expected.append(h @ C[0, t].double())
    assert_close(y[0, :, 0] / 2e4, torch.stack(expected) / 2e4, torch.float32)


def test_chunk_length_does_not_change_the_result() -> None:
    x = torch.randn(1, 77, 12, dtype=torch.float64)
    outputs = [make_layer(torch.float64, chunk_length=length)(x)[0] for length in (1, 8, 64, 128)]
    for y in outputs[1:]:
        assert_close(y, outputs[0], torch.float64)


def test_a_convolution_of_width_one_keeps_no_inputs() -> None:
    layer = make_layer(torch.float64, conv_width=1)
    x = torch.randn(1, 20, 12, dtype=torch.float64)
    first, state = layer(x[:, :11])
    assert state.conv.shape[1] == 0
    second, _ = layer(x[:, 11:], state)
    assert_close(torch.cat((first, second), dim=1), reference(layer, x), torch.float64)


def test_first_weights_are_in_the_published_ranges() -> None:
    layer = Mamba2(512)
    dt = F.softplus(layer.dt_bias)
    assert 0.9e-3 <= dt.min() < dt.max() <= 1.01e-1
    assert 1 <= layer.A_log.exp().min() < layer.A_log.exp().max() <= 16.01
    assert 0.018 < layer.in_proj.weight.std() < 0.022
    names = {name: tuple(weight.shape) for name, weight in layer.named_parameters()}
    assert names == {
        "dt_bias": (32,),
        "A_log": (32,),
        "D": (32,),
        "in_proj.weight": (2 * 1024 + 2 * 64 + 32, 512),
        "conv1d.weight": (1024 + 2 * 64, 1, 4),
        "conv1d.bias": (1024 + 2 * 64,),
        "norm.weight": (1024,),
        "out_proj.weight": (512, 1024),
    }


def test_shapes_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer, x = Mamba2(64), torch.empty(2, 100, 64)
    y, state = layer(x, layer.initial_state(2, x))
    assert (y.device.type, y.shape) == ("meta", x.shape)
    assert (state.conv.shape, state.ssm.shape) == ((2, 3, 256), (2, 4, 32, 64))


def test_autocast_keeps_the_scan_in_float32() -> None:
    layer = make_layer()
    x = torch.randn(2, 90, 12)
    expected = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, state = layer(x[:, :80])
        second, state = layer(x[:, 80:], state)
    assert first.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    error = torch.cat((first, second), dim=1) - expected
    assert error.norm() <= 2e-2 * expected.norm()


def test_state_moves_both_tensors() -> None:
    state = make_layer().initial_state(3, torch.empty(0)).to("meta", torch.float64)
    assert (state.conv.device.type, state.ssm.device.type) == ("meta", "meta")
    assert (state.conv.dtype, state.ssm.dtype) == (torch.float64, torch.float64)


def test_a_state_keeps_no_more_than_it_needs() -> None:
    layer = make_layer()
    with torch.no_grad():
        _, state = layer(torch.randn(1, 300, 12))
    assert state.conv.untyped_storage().nbytes() == state.conv.numel() * 4
    assert state.ssm.untyped_storage().nbytes() == state.ssm.numel() * 4


def test_a_state_of_the_wrong_form_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"not \[1, 3\]"):
        Mamba2State(conv=torch.zeros(1, 3), ssm=torch.zeros(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("wrong", "message"), [({"state_dim": 0}, "state_dim is 0"), ({"head_dim": 7}, "head_dim is 7; it must divide")]
)
def test_impossible_sizes_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make_layer(**wrong)
