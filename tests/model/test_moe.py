"""MoE: every path equals the loop, tokens are counted once, the bias balances, and nothing is lost on odd shapes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.layers.grouped_product import (
    _Grouped,
    _Sliced,
    grouped_swiglu,
    pair_by_pair,
    sliced,
    sort_by_expert,
)
from hsa_compile.model.layers.moe import MoE, _gathered, moe_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def make_moe(dtype: torch.dtype = torch.float32, **sizes: int) -> MoE:
    torch.manual_seed(0)
    arguments = {"num_experts": 5, "experts_per_token": 2, "expert_dim": 11, **sizes}
    moe = MoE(13, **arguments)
    moe.reset_parameters(std=0.5)
    moe.balance_bias.uniform_(-0.2, 0.2)
    return moe.to(dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().clamp_min(1).item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


def gradients(moe: MoE, out: Tensor, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    seed = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return list(torch.autograd.grad(out, [x, *moe.parameters()], seed))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 13), (3, 13), (2, 37, 13), (301, 13)], ids=str)
def test_output_and_gradients_equal_the_loop(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    moe = make_moe(dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    # The loop in float64 on the same rounded numbers.
    exact, exact_x = copy.deepcopy(moe).double(), x.detach().double().requires_grad_()
    expected = moe_reference(exact, exact_x)
    out = moe(x)
    assert out.dtype == dtype
    assert_close(out, expected, dtype)
    for actual, wanted in zip(gradients(moe, out, x), gradients(exact, expected, exact_x), strict=True):
        assert_close(actual, wanted, dtype)


def test_gradient_of_the_router_is_right_by_finite_differences() -> None:
    moe = make_moe(torch.float64, num_shared_experts=0)
    x = torch.randn(7, 13, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, router: Tensor) -> Tensor:
        return torch.func.functional_call(moe, {"router.weight": router}, (x,))

    assert torch.autograd.gradcheck(run, (x, moe.router.weight), eps=1e-7)


@pytest.mark.parametrize(
    ("num_experts", "experts_per_token"), [(1, 1), (4, 4), (64, 4)], ids=["one", "all", "most_without_tokens"]
)
def test_extreme_numbers_of_experts_equal_the_loop(num_experts: int, experts_per_token: int) -> None:
    moe = make_moe(torch.float64, num_experts=num_experts, experts_per_token=experts_per_token)
    x = torch.randn(9, 13, dtype=torch.float64, requires_grad=True)
    out, expected = moe(x), moe_reference(moe, x)
    assert_close(out, expected, torch.float64)
    for actual, wanted in zip(gradients(moe, out, x), gradients(moe, expected, x), strict=True):
        assert_close(actual, wanted, torch.float64)


def test_all_tokens_at_one_expert() -> None:
    moe = make_moe(torch.float64, experts_per_token=1)
    moe.balance_bias[3] = 10
    x = torch.randn(50, 13, dtype=torch.float64, requires_grad=True)
    out = moe(x)
    assert_close(out, moe_reference(moe, x), torch.float64)
    out.sum().backward()
    assert moe.load.tolist() == [0, 0, 0, 50, 0]
    assert moe.max_over_mean_load == 5
    assert not moe.gate_up.grad[[0, 1, 2, 4]].any()  # type: ignore[index]


@pytest.mark.parametrize("few", [pair_by_pair, _gathered])
def test_short_ways_of_decoding_equal_the_loop(few: object) -> None:
    moe = make_moe(torch.float64, num_shared_experts=0)
    x = torch.randn(3, 13, dtype=torch.float64)
    with torch.no_grad():
        out = few(x, *moe._route(x), moe.gate_up, moe.down)  # type: ignore[operator]
        assert_close(out, moe_reference(moe, x), torch.float64)


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 300])
def test_without_gradients_the_output_is_the_same(num_tokens: int) -> None:
    moe = make_moe()
    x = torch.randn(num_tokens, 13)
    with torch.no_grad():
        out = moe(x)
    assert_close(out, moe(x), torch.float32)


def test_grouped_mm_path_equals_the_sliced_one() -> None:
    # On the CPU grouped_mm is PyTorch's own loop, which takes no empty group; the steps around it are those of CUDA.
    torch.manual_seed(0)
    chosen = torch.cat((torch.arange(4).view(2, 2), torch.rand(29, 4).argsort(dim=1)[:, :2]))
    pairs = sort_by_expert(chosen, 4)
    inputs = [torch.randn(31, 8), torch.rand(31, 2), torch.randn(4, 8, 32), torch.randn(4, 16, 8)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    x, weights, gate_up, down = inputs
    expected = grouped_swiglu(x, weights, pairs, gate_up, down, sliced)
    assert isinstance(expected.grad_fn, _Sliced._backward_cls)  # type: ignore[attr-defined]
    out = _Grouped.apply(x, weights, pairs.order, pairs.inverse, pairs.ends, gate_up, down)
    assert_close(out, expected, torch.float32)
    seed = torch.randn_like(out)
    for actual, wanted in zip(
        torch.autograd.grad(out, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    ):
        assert_close(actual, wanted, torch.float32)


def test_no_tokens_give_no_tokens_and_gradients_of_zero() -> None:
    moe = make_moe()
    x = torch.randn(2, 0, 13, requires_grad=True)
    out = moe(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert all(not weight.grad.any() for weight in moe.parameters())  # type: ignore[union-attr]
    with torch.no_grad():
        assert moe(x).shape == x.shape


def test_shapes_on_the_meta_device() -> None:
    with torch.device("meta"):
        moe = MoE(2048, num_experts=64, experts_per_token=4, expert_dim=1024)
        x = torch.empty(2, 5, 2048, dtype=torch.bfloat16)
    out = moe.to(torch.bfloat16)(x)
    assert (out.device.type, out.shape, out.dtype) == ("meta", x.shape, torch.bfloat16)
    assert sum(weight.numel() for weight in moe.parameters()) == 2048 * 64 + 65 * 3 * 2048 * 1024


def test_weights_add_up_to_one_and_ignore_the_bias() -> None:
    moe = make_moe()
    x = torch.randn(40, 13)
    chosen, weights = moe._route(x)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(40))
    scores = torch.sigmoid(moe.router(x)).gather(1, chosen)
    torch.testing.assert_close(weights, scores / scores.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("logit", [-40.0, -60.0, -150.0, -1e30])
def test_weights_add_up_to_one_however_low_the_scores_are(logit: float) -> None:
    moe = MoE(4, num_experts=8, experts_per_token=2, expert_dim=8)
    with torch.no_grad():
        moe.router.weight.fill_(logit / 4)
        moe.router.weight[3] += 0.25  # a logit that is higher by 1
        moe.balance_bias[[3, 5]] = 1
    x = torch.ones(1, 4, requires_grad=True)
    chosen, weights = moe._route(x)
    assert sorted(chosen[0].tolist()) == [3, 5]
    share = torch.tensor([0.731059, 0.268941]) if logit > -1e6 else torch.tensor([0.5, 0.5])
    torch.testing.assert_close(weights[0, chosen[0].argsort()], share)
    torch.testing.assert_close(moe(x), moe_reference(moe, x))
    (gradient,) = torch.autograd.grad(weights[0, 0], moe.router.weight)
    torch.testing.assert_close(gradient[3].abs(), (share[0] * share[1]).expand(4))


def test_scores_that_underflow_give_no_nan() -> None:
    moe = make_moe()
    x = 1e6 * torch.randn(40, 13)
    x.requires_grad_()
    out = moe(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in moe.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_each_token_is_counted_once(reentrant: bool | None) -> None:
    moe = make_moe()
    x = torch.randn(33, 13, requires_grad=True)
    for repeat in (1, 2):  # two backward passes before a step add up
        out = moe(x) if reentrant is None else checkpoint(moe, x, use_reentrant=reentrant)
        out.sum().backward()
        expected = torch.bincount(moe._route(x)[0].flatten(), minlength=5) * repeat
        assert moe.load.tolist() == expected.tolist()


def test_what_trains_nothing_is_not_counted() -> None:
    moe = make_moe()
    x = torch.randn(33, 13)
    with torch.no_grad():
        moe(x)
    moe.eval()(x).sum().backward()
    assert not moe.load.any()
    assert moe.max_over_mean_load == 1


def test_update_moves_each_bias_against_its_load() -> None:
    moe = MoE(8, num_experts=4, experts_per_token=1, expert_dim=8)
    moe.load.copy_(torch.tensor([6, 1, 3, 2]))
    assert moe.max_over_mean_load == 2
    moe.update_bias(0.25)
    assert moe.balance_bias.tolist() == [-0.25, 0.25, 0, 0.25]
    assert not moe.load.any()
    moe.update_bias(0.25)  # nothing ran: nothing moves
    assert moe.balance_bias.tolist() == [-0.25, 0.25, 0, 0.25]


def test_bias_stays_in_float32_and_is_saved_and_load_is_not() -> None:
    moe = make_moe()
    bias = moe.balance_bias.clone()
    moe.to(torch.bfloat16)
    assert moe.balance_bias.dtype == torch.float32
    assert torch.equal(moe.balance_bias, bias)
    assert "balance_bias" in moe.state_dict()
    assert "load" not in moe.state_dict()


def test_balancing_from_an_unbalanced_start() -> None:
    # A router that sends nearly everything to expert 0; the data have no clusters that would help.
    torch.manual_seed(0)
    moe = MoE(16, num_experts=8, experts_per_token=2, expert_dim=16)
    with torch.no_grad():
        moe.router.weight[0, 0] = 3.0
    target = nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3)
    ratios = []
    for _ in range(150):
        x = torch.randn(512, 16)
        x[:, 0] = 1
        loss = F.mse_loss(moe(x), target(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ratios.append(moe.max_over_mean_load)
        moe.update_bias(1e-2)
    assert ratios[0] > 3.5  # 4 is all tokens at one of the two places
    assert max(ratios[-10:]) <= 1.5


def test_autocast_on_a_cpu_computes_the_shared_expert_in_bfloat16_and_the_rest_in_float32() -> None:
    moe = make_moe()
    x = torch.randn(64, 13, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe(x)
        chosen, weights = moe._route(x)
        assert moe.shared(x).dtype == torch.bfloat16  # type: ignore[misc]
        assert moe._experts(x, chosen, weights).dtype == torch.float32
    assert out.dtype == torch.float32
    assert weights.dtype == torch.float32
    assert torch.equal(chosen, moe._route(x)[0])
    expected = moe_reference(moe, x)
    assert_close(out.to(torch.bfloat16), expected, torch.bfloat16)
    out.sum().backward()
    assert moe.gate_up.grad.dtype == torch.float32  # type: ignore[union-attr]


def test_runs_are_equal_to_the_last_bit() -> None:
    moe, x = make_moe(), torch.randn(501, 13, requires_grad=True)
    first, second = moe(x), moe(x)
    assert torch.equal(first, second)
    for a, b in zip(gradients(moe, first, x), gradients(moe, second, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_compiled_module_gives_the_same() -> None:
    moe, x = make_moe(), torch.randn(33, 13, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(moe, backend="aot_eager")
    out = compiled(x)
    assert_close(out, moe(x), torch.float32)
    out.sum().backward()
    assert moe.load.sum() == 66


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"expert_dim": -1}, "expert_dim is -1"),
        ({"experts_per_token": 6}, "experts_per_token is 6; allowed are 1 to 5"),
        ({"num_shared_experts": -2}, "num_shared_experts is -2"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make_moe(**wrong)


@pytest.mark.parametrize("biased", [False, True])
def test_equal_tokens_and_tokens_that_all_choose_the_same_equal_the_loop(biased: bool) -> None:
    moe = make_moe()
    x = torch.randn(1, 13).expand(64, 13).clone() if not biased else torch.randn(64, 13)
    if biased:
        moe.balance_bias[3], moe.balance_bias[1] = 10, 9
    x.requires_grad_()
    exact, exact_x = copy.deepcopy(moe).double(), x.detach().double().requires_grad_()
    out, expected = moe(x), moe_reference(exact, exact_x)
    assert_close(out, expected, torch.float32)
    for actual, wanted in zip(gradients(moe, out, x), gradients(exact, expected, exact_x), strict=True):
        assert_close(actual, wanted, torch.float32)


def test_a_token_that_is_no_number_changes_no_other() -> None:
    moe, x = make_moe().eval(), torch.randn(20, 13)
    broken, others = x.clone(), [row for row in range(20) if row != 7]
    broken[7] = float("nan")
    with torch.no_grad():
        assert torch.equal(moe(x)[others], moe(broken)[others])
        assert moe(broken)[7].isnan().all()
