"""The op as PyTorch's tools see it: schema, tracing, compilation, export."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hsa_compile import Problem, Schedule, hsa_attention, hsa_decode, select_chunks
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.hsa_attention import dispatch as torch_ops
from hsa_compile.kernels.select_chunks import dispatch as select_ops

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::hsa_compile.errors.UntunedWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
    pytest.mark.usefixtures("without_compiler"),
]
C, K = 8, 3


def tensors(T: int = 21, S: int = 45, *, requires_grad: bool = True) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_(requires_grad)

    q, k, v = normal(2, T, 4, 16), normal(2, S, 2, 16), normal(2, S, 2, 16)
    indices = torch.randint(-1, S // C, (2, T, 2, K), generator=generator)
    weights = torch.rand(2, T, 2, K, generator=generator).requires_grad_(requires_grad)
    return q, k, v, indices, weights


def attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return hsa_attention(q, k, v, indices, weights, chunk_size=C)


def test_opcheck_of_forward_and_backward() -> None:
    q, k, v, indices, weights = tensors()
    options = (C, 0.25, False, False, False)
    torch.library.opcheck(torch_ops.hsa_forward, (q, k, v, indices, weights, None, *options))
    plain = tensors(requires_grad=False)
    torch.library.opcheck(torch_ops.hsa_backward, (*plain, None, torch.randn(q.shape), *options))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiles_whole_forward_and_backward_for_any_length(backend: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, examples: list[Tensor]):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, examples)

    compiled = torch.compile(lambda *x: attend(*x).relu(), backend=count, fullgraph=True, dynamic=True)
    for T in (21, 34, 55):
        given = tensors(T, T + 24)
        leaves = [x for x in given if x.requires_grad]
        expected = attend(*given).relu()
        actual = compiled(*given)
        assert torch.equal(actual, expected)
        for one, other in zip(
            torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            assert torch.equal(one, other)
    assert len(graphs) == 1


def test_packed_sequences_compile() -> None:
    torch._dynamo.reset()
    cu_seqlens = torch.tensor([0, 13, 45])
    q, k, v, indices, weights = (x[:1] for x in tensors(45, 45, requires_grad=False))

    def packed(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, cu_seqlens: Tensor) -> Tensor:
        return hsa_attention(q, k, v, indices, weights, chunk_size=C, cu_seqlens=cu_seqlens)

    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    given = (q, k, v, indices, weights, cu_seqlens)
    assert torch.equal(compiled(*given), packed(*given))


def decoded(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    k_pages, v_pages = (x[0, :40].unflatten(0, (5, C)).transpose(1, 2).contiguous() for x in (k, v))
    return hsa_decode(q[:, :9], k_pages, v_pages, indices[:, :9], weights[:, :9])


def picked(q: Tensor, k: Tensor, *_: Tensor) -> Tensor:
    return selected(q[:, :, :2], k[:, ::C])[1]


def decoded_raw(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    k_pages, v_pages = (x[0, :40].unflatten(0, (5, C)).transpose(1, 2).contiguous() for x in (k, v))
    given = (q[:, :9], k_pages, v_pages, indices[:, :9], weights[:, :9])
    return torch.ops.hsa_compile.hsa_decode(*given, None, 1.0, False, False)


@pytest.mark.parametrize("call", [attend, picked, decoded, decoded_raw])
def test_forward_mode_derivatives_are_refused_and_not_zero(call: Callable[..., Tensor]) -> None:
    q, *others = tensors(requires_grad=False)
    with pytest.raises(InvalidArgument, match="has no forward-mode derivative"):
        torch.func.jvp(lambda x: call(x, *others), (q,), (torch.ones_like(q),))


@pytest.mark.parametrize("call", [attend, picked])
def test_second_derivatives_are_refused_and_not_zero(call: Callable[..., Tensor]) -> None:
    given = tensors()
    (grad,) = torch.autograd.grad(call(*given).pow(2).sum(), given[0], create_graph=True)
    with pytest.raises(InvalidArgument, match="has no second derivative"):
        grad.pow(2).sum().backward()


def test_exports() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            return attend(q, k, v, indices, weights)

    given = tensors(requires_grad=False)
    exported = torch.export.export(Attention(), given)
    assert "hsa_compile.hsa_forward" in str(exported.graph)
    assert torch.equal(exported.module()(*given), attend(*given))


def test_shapes_are_known_without_data() -> None:
    given = [x.to("meta") for x in tensors(requires_grad=False)]
    assert attend(*given).shape == (2, 21, 4, 16)


def selected(query: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor]:
    return select_chunks(query, landmarks, chunk_size=C, top_k=K, noise_seed=3)


@pytest.mark.parametrize("landmarks_per_chunk", [1, 2])
def test_opcheck_of_selection(landmarks_per_chunk: int) -> None:
    query, landmarks = (torch.randn(2, n, 2, 16, requires_grad=True) for n in (40, 5 * landmarks_per_chunk))
    options = (landmarks_per_chunk, C, K, 0, "softmax", None, False)
    torch.library.opcheck(select_ops.select_chunks, (query, landmarks, *options))
    _, indices = select_ops.select_chunks(query, landmarks, *options)
    plain = (query.detach(), landmarks.detach(), indices, torch.randn(indices.shape))
    torch.library.opcheck(select_ops.select_chunks_backward, (*plain, landmarks_per_chunk, C, "softmax", False))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_selection_and_attention_compile_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()

    def layer(query: Tensor, landmarks: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, *selected(query, landmarks))

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for T in (40, 56):
        q, k, v, *_ = tensors(T, T)
        leaves = [
            torch.randn(2, T, 2, 16, requires_grad=True), torch.randn(2, T // C, 2, 16, requires_grad=True), q, k, v
        ]  # fmt: skip
        expected, actual = layer(*leaves), compiled(*leaves)
        assert torch.equal(actual, expected)
        for one, other in zip(
            torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            assert torch.equal(one, other)


def test_selection_exports() -> None:
    class Selection(nn.Module):
        def forward(self, query: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor]:
            return selected(query, landmarks)

    given = (torch.randn(2, 40, 2, 16), torch.randn(2, 5, 2, 16))
    exported = torch.export.export(Selection(), given)
    for one, other in zip(exported.module()(*given), selected(*given), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("call", "op"), [(attend, "hsa_forward"), (picked, "select_chunks"), (decoded, "hsa_decode")])
def test_a_trace_names_the_problem_and_the_schedule_of_a_call(call: Callable[..., Tensor], op: str) -> None:
    given = tensors(requires_grad=False)
    expected = call(*given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        assert torch.equal(call(*given), expected)
    (name,) = (event.name for event in trace.events() if event.name.startswith(f"{op} "))
    problem, schedule = name.split(" | ")
    assert f" B2 T{9 if call is decoded else 21} " in problem
    assert str(Schedule.parse(schedule)) == schedule


def test_without_a_profiler_a_call_makes_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors(requires_grad=False)
    expected = attend(*given)
    monkeypatch.setattr(Problem, "describe", None)
    assert torch.equal(attend(*given), expected)
