from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.hsa_attention.inputs import RecordedPicks, make_inputs, pick_chunks
from hsa_compile.problem import DISTRIBUTIONS, Problem

CPU = torch.device("cpu")
PROBLEM = Problem(batch=2, seq_len=1003, num_heads=6, num_kv_heads=2, head_dim=8, value_dim=12, chunk_size=16, top_k=5)
any_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
shapes = pytest.mark.parametrize(
    "problem",
    [
        PROBLEM,
        replace(PROBLEM, kv_len=2005),
        replace(PROBLEM, kv_len=300),
        replace(PROBLEM, seq_len=1, kv_len=777),
        replace(PROBLEM, seq_len=1, kv_len=1),
        replace(PROBLEM, top_k=1),
        replace(PROBLEM, top_k=64, kv_len=1003),
    ],
    ids=lambda problem: f"T{problem.seq_len}-S{problem.kv_len}-K{problem.top_k}",
)


def picks_of(problem: Problem, distribution: str, seed: int = 0) -> Tensor:
    return pick_chunks(problem, distribution, torch.Generator().manual_seed(seed))


def visible_chunks(problem: Problem) -> Tensor:
    """`[T]`: whole chunks that end at or before each query's own chunk; the queries are the last of the keys."""
    position = torch.arange(problem.seq_len) + max(0, problem.kv_len - problem.seq_len)
    return (position // problem.chunk_size).clamp(max=problem.num_chunks)


def sorted_slots(picks: Tensor) -> Tensor:
    return picks.sort(dim=-1).values


def repeated(picks: Tensor) -> Tensor:
    """Which slots repeat the one before in sorted order."""
    ordered = sorted_slots(picks)
    return (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)


def overlap(picks: Tensor) -> float:
    """Share of its picks that a token has in common with the token before it."""
    late = picks[:, picks.shape[1] // 2 :]
    same = (late[:, 1:, :, :, None] == late[:, :-1, :, None, :]).any(dim=-1)
    return float(same.float().mean())


@any_distribution
@shapes
def test_picks_are_causal_and_in_range(problem: Problem, distribution: str) -> None:
    picks = picks_of(problem, distribution)
    assert picks.shape == (problem.batch, problem.seq_len, problem.num_kv_heads, problem.top_k)
    assert picks.dtype == torch.int32
    assert picks.min() >= -1
    assert (picks < visible_chunks(problem).view(1, -1, 1, 1)).all()
    assert (picks < max(1, problem.num_chunks)).all()


@any_distribution
@shapes
def test_slots_are_empty_only_where_too_few_chunks_are_visible(problem: Problem, distribution: str) -> None:
    filled = (picks_of(problem, distribution) >= 0).sum(dim=-1)
    expected = visible_chunks(problem).clamp(max=problem.top_k).view(1, -1, 1)
    assert (filled == expected).all()


@pytest.mark.parametrize("distribution", ["random", "local"])
@shapes
def test_no_chunk_is_picked_twice_by_one_token(problem: Problem, distribution: str) -> None:
    assert not repeated(picks_of(problem, distribution)).any()


def test_random_picks_are_nearly_uniform() -> None:
    problem = Problem(seq_len=1, kv_len=37 * 4 + 3, batch=20000, num_heads=1, num_kv_heads=1, head_dim=8,
                      chunk_size=4, top_k=5)  # fmt: skip
    counts = picks_of(problem, "random").flatten().bincount(minlength=37).double()
    assert counts.min() > 0.8 * counts.mean()
    assert counts.max() < 1.25 * counts.mean()


def test_local_picks_overlap_from_token_to_token_far_more_than_random_ones() -> None:
    problem = replace(PROBLEM, seq_len=4001, kv_len=4001)
    assert overlap(picks_of(problem, "random")) < 0.15
    assert overlap(picks_of(problem, "local")) > 0.5


def test_hot_picks_fall_on_early_chunks_far_more_than_random_ones() -> None:
    def early(distribution: str) -> float:
        late = picks_of(PROBLEM, distribution)[:, PROBLEM.seq_len // 2 :]
        quarter = visible_chunks(PROBLEM)[PROBLEM.seq_len // 2 :].view(1, -1, 1, 1) / 4
        return float((late < quarter).float().mean())

    assert early("random") == pytest.approx(0.25, abs=0.05)
    assert early("hot") > 0.5
    assert repeated(picks_of(PROBLEM, "hot")).any()


@any_distribution
def test_the_same_seed_gives_the_same_tensors_and_another_seed_others(distribution: str) -> None:
    one, same, other = (make_inputs(PROBLEM, CPU, distribution=distribution, seed=seed) for seed in (5, 5, 6))
    for name in ("q", "k", "v", "chunk_indices", "chunk_weights", "grad_o"):
        assert torch.equal(getattr(one, name), getattr(same, name)), name
        assert not torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("per_head_weights", [False, True], ids=["shared", "per-head"])
def test_tensors_have_the_shapes_and_dtypes_of_the_op(dtype: str, per_head_weights: bool) -> None:
    problem = replace(PROBLEM, kv_len=300, dtype=dtype, per_head_weights=per_head_weights)
    inputs = make_inputs(problem, CPU)
    B, T, S, HQ, H, D, Dv, K = 2, 1003, 300, 6, 2, 8, 12, 5
    assert inputs.q.shape == (B, T, HQ, D)
    assert inputs.k.shape == (B, S, H, D)
    assert inputs.v.shape == (B, S, H, Dv)
    assert inputs.grad_o.shape == (B, T, HQ, Dv)
    assert inputs.chunk_weights.shape == (B, T, HQ if per_head_weights else H, K)
    assert {x.dtype for x in (inputs.q, inputs.k, inputs.v, inputs.grad_o)} == {getattr(torch, dtype)}
    assert inputs.chunk_weights.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert len(inputs.arguments("hsa_forward")) == 5
    assert inputs.arguments("hsa_backward")[5] is inputs.grad_o


def test_an_unknown_distribution_is_refused_with_those_that_are_allowed() -> None:
    with pytest.raises(InvalidArgument, match="distribution = 'odd' is not one of random, local, hot"):
        make_inputs(PROBLEM, CPU, distribution="odd")


@any_distribution
def test_picks_of_a_long_sequence_take_memory_linear_in_its_length(distribution: str) -> None:
    problem = Problem(seq_len=20_001, num_heads=1, num_kv_heads=1, head_dim=8, chunk_size=16, top_k=8)
    largest = 0

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Largest():
        picks_of(problem, distribution)
    assert problem.seq_len <= largest <= 4 * problem.seq_len * problem.top_k


def test_trained_picks_drift_as_those_of_a_trained_model() -> None:
    top_k, tokens = 16, 4096
    problem = Problem(seq_len=4 * tokens, num_heads=1, num_kv_heads=1, head_dim=8, top_k=top_k)
    picks = pick_chunks(problem, "trained", torch.Generator().manual_seed(0))[0, -tokens:, 0]  # [T, K]
    shared = (picks[1:, :, None] == picks[:-1, None, :]).any(dim=2).double().mean().item()
    assert shared == pytest.approx(0.81, abs=0.03)
    for neighbours, measured in ((4, 1.43), (16, 2.16), (64, 3.30)):
        unions = [len(set(block.flatten().tolist())) / top_k for block in picks.split(neighbours)]
        assert sum(unions) / len(unions) == pytest.approx(measured, rel=0.2)


def picks_file(path: Path, *, layers: int = 2, heads: int = 3, top_k: int = 4, **changes: Tensor) -> Path:
    """A file of causal picks of chunks of 16 tokens, as two layers on one row of 131 tokens would make them."""
    shape, generator = (1, 131, heads, top_k), torch.Generator().manual_seed(0)
    visible = (torch.arange(131) // 16).view(1, -1, 1, 1)
    tensors = {"chunk_size": torch.tensor([16])}
    for layer in range(layers):
        picks = (torch.rand(shape, generator=generator) * (visible + 1)).int() - 1  # −1 … visible − 1
        tensors[f"layers.{layer}.chunk_indices"] = picks
        tensors[f"layers.{layer}.chunk_weights"] = torch.rand(shape, generator=generator)
    safetensors.torch.save_file({**tensors, **changes}, path)
    return path


@shapes
def test_recorded_picks_are_causal_and_in_range_at_any_shape(problem: Problem, tmp_path: Path) -> None:
    problem = replace(problem, top_k=min(problem.top_k, 4))
    picks = picks_of(problem, str(picks_file(tmp_path / "picks.safetensors")))
    assert picks.dtype == torch.int32
    assert picks.shape == (problem.batch, problem.seq_len, problem.num_kv_heads, problem.top_k)
    assert (
        ((picks >= -1) & (picks < visible_chunks(problem).view(1, -1, 1, 1).clamp(min=0))).logical_or(picks == -1).all()
    )


def test_recorded_picks_are_those_of_the_file_and_of_more_slots_the_heaviest_stay(tmp_path: Path) -> None:
    recorded = RecordedPicks.load(picks_file(tmp_path / "picks.safetensors"))
    problem = Problem(batch=2, seq_len=131, num_heads=3, num_kv_heads=3, head_dim=8, chunk_size=16, top_k=4)
    assert torch.equal(sorted_slots(recorded.stretched(problem)), sorted_slots(recorded.indices))
    one = recorded.stretched(replace(problem, top_k=1))
    heaviest = recorded.weights.masked_fill(recorded.indices < 0, -1.0).argmax(dim=-1, keepdim=True)
    assert torch.equal(one, recorded.indices.gather(3, heaviest))
    last = recorded.stretched(replace(problem, seq_len=3, kv_len=131))
    assert torch.equal(sorted_slots(last), sorted_slots(recorded.indices[:, -3:]))


def test_a_longer_text_repeats_recorded_picks_and_reaches_back_to_the_beginning(tmp_path: Path) -> None:
    recorded = RecordedPicks.load(picks_file(tmp_path / "picks.safetensors", layers=1))
    problem = Problem(seq_len=262, num_heads=3, num_kv_heads=3, head_dim=8, chunk_size=16, top_k=4)
    second = recorded.stretched(problem)[:, 131:]
    expected = torch.where(recorded.indices < 0, -1, 2 * recorded.indices + 1)
    assert torch.equal(sorted_slots(second), sorted_slots(expected))
    assert overlap(second) == pytest.approx(overlap(recorded.indices))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": torch.tensor([16.0])}, "profile --record-picks writes such files"),
        ({"chunk_size": torch.tensor([0])}, "chunk_size 0; allowed is 1"),
        ({"more": torch.zeros(1)}, "profile --record-picks writes such files"),
        ({"layers.0.chunk_indices": torch.zeros(1, 131, 3, 4)}, "allowed is torch"),
        ({"layers.0.chunk_weights": torch.zeros(1, 131, 3, 5)}, "allowed is torch"),
        ({"layers.1.chunk_indices": torch.zeros(1, 131, 3, 4).int()}, "a chunk that is not complete at its token"),
        ({"layers.1.chunk_indices": torch.full((1, 131, 3, 4), -2).int()}, "a chunk that is not complete at its token"),
        ({"layers.0.chunk_weights": torch.full((1, 131, 3, 4), torch.nan)}, "not finite"),
    ],
)
def test_a_file_of_other_things_than_picks_is_refused(changes: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=message):
        RecordedPicks.load(picks_file(tmp_path / "picks.safetensors", **changes))


def test_a_torn_or_missing_file_of_picks_is_refused(tmp_path: Path) -> None:
    path = picks_file(tmp_path / "picks.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InvalidArgument, match="no whole safetensors file"):
        RecordedPicks.load(path)
    with pytest.raises(InvalidArgument, match="No such file"):
        RecordedPicks.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 32}, "have chunk_size 16; the problem has 32"),
        ({"top_k": 5}, "have 4 slots a token; the problem has 5"),
        ({"op": "select_chunks", "num_heads": 2}, "picks .* are for the attention ops"),
    ],
)
def test_a_problem_that_recorded_picks_do_not_fit_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    recorded = RecordedPicks.load(picks_file(tmp_path / "picks.safetensors"))
    with pytest.raises(InvalidArgument, match=message):
        recorded.stretched(replace(PROBLEM, **{"top_k": 4, **changes}))
