"""Each contender computes what it claims to, and what does not is caught."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from hsa_compile.autotune.bench.device import free_bytes
from hsa_compile.comparison import BOTH, DECODE, FORWARD, KINDS, SELECT
from hsa_compile.comparison.baselines import (
    block_mask,
    check_other,
    definition,
    dense_contenders,
    flex_contenders,
    nsa_contenders,
    sampled_tokens,
)
from hsa_compile.comparison.contender import DENSE, SAME, SPARSE, Case, dense_work, sparse_work
from hsa_compile.comparison.contenders import OURS, contenders_for
from hsa_compile.comparison.same_function import bind, check_function, dense_topk, gather_attention, gather_decode
from hsa_compile.errors import InvalidArgument, NotFinite, WrongResult

CaseOf = Callable[..., Case]
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_that_can_run_on_a_cpu_pass_the_check_of_their_claim(kind: str, dtype: str, case_of: CaseOf) -> None:
    case = case_of(kind, dtype=dtype)
    entered = [one for one in contenders_for(CPU) if kind in one.kinds and one.why_not(case) is None]
    assert entered[0].name == OURS
    assert len(entered) == {SELECT: 2}.get(kind, 3)
    for contender in entered:
        contender.check(case, contender.make(case))


@pytest.mark.parametrize("length", [64, 67, 200])
@pytest.mark.parametrize("kind", [FORWARD, BOTH, DECODE])
def test_queries_that_are_not_as_many_as_the_keys_are_the_last_ones(kind: str, length: int, case_of: CaseOf) -> None:
    problem = replace(case_of(kind).problem, seq_len=5 if kind == DECODE else 67, kv_len=length // 16 * 16)
    case = Case.of(kind, problem, CPU)
    for contender in contenders_for(CPU):
        if kind in contender.kinds and contender.why_not(case) is None:
            contender.check(case, contender.make(case))


def test_tokens_are_sampled_alike_under_any_default_dtype(case_of: CaseOf) -> None:
    case, before = case_of(FORWARD, 2000), torch.get_default_dtype()
    expected = sampled_tokens(case, DENSE)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(sampled_tokens(case, DENSE), expected)
    finally:
        torch.set_default_dtype(before)


def test_every_contender_of_a_kind_gives_the_tensors_of_that_kind(case_of: CaseOf) -> None:
    for kind, count in ((FORWARD, 1), (SELECT, 2), (DECODE, 1), (BOTH, 5)):
        case = case_of(kind)
        assert len(bind({SELECT: dense_topk, DECODE: gather_decode}.get(kind, gather_attention), case)()) == count


def test_attention_that_ignores_the_weights_is_wrong(case_of: CaseOf) -> None:
    def plain(*tensors: Tensor, chunk_size: int) -> Tensor:
        return gather_attention(*tensors[:4], torch.ones_like(tensors[4]) / 3, chunk_size=chunk_size)

    with pytest.raises(WrongResult, match="o is off by"):
        check_function(plain, case_of(FORWARD))


def test_a_gradient_that_is_missing_or_wrong_is_caught_where_backward_is_timed(case_of: CaseOf) -> None:
    def no_gradient_of_v(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, chunk_size: int) -> Tensor:
        return gather_attention(q, k, v.detach() + 0 * v, *rest, chunk_size=chunk_size)

    def no_gradient(*tensors: Tensor, chunk_size: int) -> Tensor:
        return gather_attention(*(x.detach() for x in tensors), chunk_size=chunk_size)

    check_function(no_gradient_of_v, case_of(FORWARD))
    with pytest.raises(WrongResult, match="dv is off by"):
        check_function(no_gradient_of_v, case_of(BOTH))
    with pytest.raises(WrongResult, match="o has no gradient"):
        check_function(no_gradient, case_of(BOTH))


def test_attention_that_forgets_duplicate_picks_is_wrong(case_of: CaseOf) -> None:
    def once(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, *, chunk_size: int) -> Tensor:
        repeated = (indices.unsqueeze(-1) == indices.unsqueeze(-2)).tril(-1).any(dim=-1)
        return gather_attention(q, k, v, torch.where(repeated, -1, indices), weights, chunk_size=chunk_size)

    with pytest.raises(WrongResult, match="a small odd shape"):
        check_function(once, case_of(FORWARD))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda indices, weights: (indices.flip(3), weights), "chunk_indices"),
        (lambda indices, weights: (indices, weights * 1.01), "chunk_weights is off by"),
        (lambda indices, weights: (indices - 1, weights), "chunk_indices name chunks"),
        (lambda indices, weights: indices, "not a pair"),
        (lambda indices, weights: (indices[..., 1:], weights), "chunk_indices has shape"),
    ],
    ids=["unsorted", "weights", "others", "one tensor", "too few"],
)
def test_selection_that_is_wrong_is_caught(spoil: Any, reason: str, case_of: CaseOf) -> None:
    with pytest.raises(WrongResult, match=reason):
        check_function(lambda *tensors, **options: spoil(*dense_topk(*tensors, **options)), case_of(SELECT))


def test_decoding_of_another_shape_or_value_is_caught(case_of: CaseOf) -> None:
    with pytest.raises(WrongResult, match="o has shape"):
        check_function(lambda *tensors, **options: gather_decode(*tensors, **options)[0], case_of(DECODE))
    with pytest.raises(WrongResult, match="o is off by"):
        check_function(lambda *tensors, **options: gather_decode(*tensors, **options) * 1.1, case_of(DECODE))
    with pytest.raises(WrongResult, match="o is a str, not a tensor"):
        check_function(lambda *tensors, **options: "o", case_of(DECODE))


def test_dense_attention_that_is_not_causal_or_not_finite_is_caught(case_of: CaseOf) -> None:
    case = case_of(BOTH)
    right = dense_contenders(CPU)[0].make(case)
    check_other(DENSE)(case, right)
    o, dq = right()
    for wrong, reason in (
        ((o.roll(1, dims=1), dq), "o is off"),
        ((o, dq * 1.1), "dq is off"),
        ((o[..., 1:], dq), "o has shape"),
    ):
        with pytest.raises(WrongResult, match=reason):
            check_other(DENSE)(case, lambda wrong=wrong: wrong)
    with pytest.raises(NotFinite):
        check_other(DENSE)(case, lambda: (o / 0, dq))


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("length", [100, 300])
def test_the_block_mask_lets_each_token_see_its_chunks_and_no_other(length: int, case_of: CaseOf) -> None:
    case = case_of(BOTH, length)
    inputs = case.attention
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    o = flex_attention(q, k, v, block_mask=block_mask(case), enable_gqa=True).transpose(1, 2)
    tokens = sampled_tokens(case, SPARSE)
    assert len(tokens) > 4
    torch.testing.assert_close(o[:, tokens].double(), definition(case, SPARSE, tokens)[0], rtol=1e-5, atol=1e-5)
    empty = (inputs.chunk_indices < 0).all(dim=3).all(dim=2)[0]
    assert empty.any()
    assert not o[:, empty].any()


def test_one_softmax_over_all_chunks_is_dense_attention_where_all_are_picked(case_of: CaseOf) -> None:
    case = case_of(FORWARD, 96)
    everything = torch.arange(6, dtype=torch.int32).expand(1, 96, 2, 6)
    inputs = replace(case.attention, chunk_indices=everything)
    last = torch.tensor([95])
    sparse, dense = (definition(replace(case, inputs=inputs), claim, last)[0] for claim in (SPARSE, DENSE))
    torch.testing.assert_close(sparse, dense)


def test_what_cannot_run_here_says_why(case_of: CaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    (flex,), (nsa,) = flex_contenders(), nsa_contenders()
    assert flex.computes == nsa.computes == SPARSE
    assert "needs a C++ compiler" in str(flex.why_not(case_of(FORWARD)))
    assert "no backward" in str(flex.why_not(case_of(BOTH)))
    assert "need a GPU" in str(nsa.why_not(case_of(FORWARD)))
    gather = contenders_for(CPU, ("gather",))[1]
    assert gather.computes == SAME
    assert gather.why_not(case_of(BOTH)) is None
    monkeypatch.setattr("hsa_compile.comparison.same_function.free_bytes", lambda device: 1 << 20)
    assert "what it saves for backward would take about" in str(gather.why_not(case_of(BOTH)))
    assert gather.why_not(case_of(FORWARD)) is None
    assert free_bytes(CPU) != 1 << 20


def test_work_is_that_of_pairs_that_there_are(case_of: CaseOf) -> None:
    case = case_of(FORWARD, 64)
    pairs = sum(range(1, 65)) * 4
    assert dense_work(case).flops == 2 * pairs * 32
    assert dense_work(case_of(BOTH, 64)).flops == 3.5 * dense_work(case).flops
    for queries, keys, seen in ((2, 5, 9), (5, 2, 9), (3, 3, 6)):
        other = replace(case, problem=replace(case.problem, seq_len=queries, kv_len=keys))
        assert dense_work(other).flops == 2 * seen * 4 * 32
    picks = int((case.attention.chunk_indices >= 0).sum()) * 2  # query heads of a kv head
    assert sparse_work(case).flops == pytest.approx(2 * picks * 16 * 32)
    assert sparse_work(case_of(BOTH, 64)).flops == pytest.approx(3.5 * sparse_work(case).flops)
    decoded = case_of(DECODE, 64)
    assert dense_work(decoded).flops == pytest.approx(2 * 4 * (64 + 0) * 32)
    assert sparse_work(decoded).flops == pytest.approx(2 * 3 * 4 * 16 * 32)


def test_a_case_of_another_op_is_refused(case_of: CaseOf) -> None:
    with pytest.raises(InvalidArgument, match="kind = 'select' of hsa_forward"):
        replace(case_of(FORWARD), kind="select")
