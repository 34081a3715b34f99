"""The bytes that processes send, training or decoding, are those that the formulas of `model info --devices` say."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_group
from small_models import build, small_config
from small_runs import Trainer, small_run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from hsa_compile.model.cost.info import model_info
from hsa_compile.model.cost.scale import Cluster, Paper
from hsa_compile.model.cost.traffic import (
    ALL_REDUCE,
    ALL_TO_ALL,
    GATHER,
    KINDS,
    REDUCE_SCATTER,
    Split,
    decode_sent,
    messages,
)
from hsa_compile.model.inference.inference import extend, new_state, prefill
from hsa_compile.model.layers import hs_attention
from hsa_compile.model.layers.exchange import SharedRows
from hsa_compile.model.layers.moe import MoE
from hsa_compile.model.layers.picked_chunks import FetchedChunks, fetch_chunks
from hsa_compile.model.training.config import RunConfig
from hsa_compile.model.training.processes import Processes

PROCESSES, ROWS = 4, 8
# Sizes that four processes divide: FSDP fills up what they do not.
SIZES = {"dim": 32, "head_dim": 8, "retrieval_dim": 12, "window": 13, "selection_noise": False}
MESHES = {"data 4": (1, 1), "context 4": (4, 1), "context 2 x expert 2": (2, 2), "expert 4": (1, 4)}


# The two ways to read chunks of other processes; where rows are not shared, the first says nothing.
GATHERED, PICKED = {"chunk_exchange": "gather"}, {"chunk_exchange": "travel"}


class Picked:
    """Counts what heads have of chunks of other processes and tokens picked, apart from how these are brought."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = self.texts = 0
        monkeypatch.setattr(hs_attention, "fetch_chunks", self._fetch)

    def _fetch(self, k: Tensor, v: Tensor, indices: Tensor, owners: SharedRows, *, in_batch: bool) -> FetchedChunks:
        assert not in_batch
        for row in indices:
            for head in range(row.shape[1]):
                picks = set(row[:, head].flatten().tolist()) - {-1}
                self.count += sum(not owners.start <= pick < owners.end for pick in picks)
        self.texts += len(indices)
        return fetch_chunks(k, v, indices, owners, in_batch=in_batch)

    def a_text(self) -> float | None:
        """How many there are for one text at one retrieval, on average over all processes; None if all are gathered."""
        counts = torch.tensor([self.count, self.texts], dtype=torch.float64)
        dist.all_reduce(counts)
        return float(counts[0] / counts[1]) if counts[1] else None


class Sent(TorchDispatchMode):
    """Counts the bytes that this process sends to others, by kind; a ring is taken for sums over all."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(KINDS, 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        match name:
            case "_allgather_base_":
                self.bytes[GATHER] += args[0].nbytes - args[1].nbytes
            case "allgather_":
                (values,), group = args[1], dist.ProcessGroup.unbox(args[2])
                self.bytes[GATHER] += values.nbytes * (group.size() - 1)
            case "all_gather_into_tensor":
                self.bytes[GATHER] += args[0].nbytes * (args[1] - 1)
            case "_reduce_scatter_base_":
                self.bytes[REDUCE_SCATTER] += args[1].nbytes - args[0].nbytes
            case "reduce_scatter_tensor":
                self.bytes[REDUCE_SCATTER] += args[0].nbytes * (1 - 1 / args[2])
            case "alltoall_base_":
                assert not args[4]  # as much to each
                self.bytes[ALL_TO_ALL] += args[1].nbytes * (1 - 1 / dist.ProcessGroup.unbox(args[2]).size())
            case "all_to_all_single":
                rows, kept = args[0], args[2][_resolve_process_group(args[3]).rank()]
                self.bytes[ALL_TO_ALL] += rows[kept:].nbytes
            case "allreduce_":
                (values,), group = args[0], dist.ProcessGroup.unbox(args[1])
                self.bytes[ALL_REDUCE] += 2 * values.nbytes * (1 - 1 / group.size())
            case _:
                assert name in ("wait_tensor", "_wrap_tensor_autograd"), name


def counted(run: RunConfig) -> dict[str, float]:
    """What a process sends in the run's first step, on average."""
    trainer = Trainer(run, Processes(rank=dist.get_rank(), world_size=PROCESSES, device=torch.device("cpu")))
    with Sent() as sent:
        trainer.step(0)
    found = torch.tensor([sent.bytes[kind] for kind in KINDS], dtype=torch.float64)
    dist.all_reduce(found)
    return dict(zip(KINDS, (found / PROCESSES).tolist(), strict=True))


def expected(run: RunConfig, fetched: float | None) -> dict[str, float]:
    """What the formulas say, for float32 and so many picked chunks."""
    train = run.train
    split = Split(
        rows=ROWS,
        data_parallel=PROCESSES // train.context_parallel,
        context_parallel=train.context_parallel,
        expert_parallel=train.expert_parallel,
        parts=train.accumulation,
        recomputes=train.checkpoint_activations,
        fetched=fetched,
    )
    paper = Paper(
        info=model_info(run.model, context=run.stages[0].seq_len - 1), cluster=Cluster.parse(f"{PROCESSES}xh100")
    )
    said = dict.fromkeys(KINDS, 0.0)
    for message in messages(paper, split, itemsize=4):
        said[message.kind] += message.sent
    return said


def route_evenly(moe: MoE, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Gives each expert as many tokens."""
    pairs = torch.arange(tokens.shape[0] * moe.experts_per_token) % moe.num_experts
    chosen = pairs.view(-1, moe.experts_per_token)
    return chosen, moe.router(tokens).gather(1, chosen).softmax(dim=-1)


def compare(cases: list[tuple[str, str, dict[str, Any]]]) -> None:
    MoE._route = route_evenly  # type: ignore[method-assign]
    monkeypatch = pytest.MonkeyPatch()
    for variant, mesh, train in cases:
        context, experts = MESHES[mesh]
        # Text of 56 tokens has 64 with the landmark tokens of DRT.
        length = 57 if variant == "drt" else 65
        run = small_run(
            model={**SIZES, "variant": variant},
            stages=[{"seq_len": length, "batch_tokens": ROWS * length}],
            context_parallel=context,
            expert_parallel=experts,
            **train,
        )
        with monkeypatch.context() as patched:
            picked = Picked(patched)
            found = counted(run)
        fetched = picked.a_text()
        assert (fetched is not None) == (train["chunk_exchange"] == "travel")
        said = expected(run, fetched)
        for kind in KINDS:
            assert found[kind] == pytest.approx(said[kind], rel=1e-9), f"{kind}, {variant}, {mesh}, {train}"


@pytest.mark.slow
def test_a_step_sends_what_the_formulas_say(tmp_path: Path) -> None:
    recomputed = {"checkpoint_activations": True}
    cases = [("hsa-ultralong", "context 2 x expert 2", {**recomputed, **way}) for way in (GATHERED, PICKED)]
    in_group(compare, PROCESSES, tmp_path, cases)


@pytest.mark.exhaustive
def test_every_arrangement_sends_what_the_formulas_say(tmp_path: Path) -> None:
    rivals = dict.fromkeys(("drt", "ramba", "swa"), ("context 4", "context 2 x expert 2"))
    cases = [
        (variant, mesh, {**train, **way})
        for variant, meshes in {"hsa-ultralong": tuple(MESHES), **rivals}.items()
        for mesh in meshes
        for train in ({"checkpoint_activations": True}, {"checkpoint_activations": False}, {"accumulation": 2})
        for way in ((GATHERED, PICKED) if "context" in mesh and variant != "swa" else (GATHERED,))
    ]
    in_group(compare, PROCESSES, tmp_path, cases)


def compare_decoding(size: int, variants: list[str]) -> None:
    mesh = init_device_mesh("cpu", (size,))
    for variant in variants:
        model = build(small_config(variant))
        state, chunk = new_state(model, mesh=mesh), model.config.chunk_size
        prefill(model, torch.ones(1, 80, dtype=torch.int64), state)
        with Sent() as sent:
            for token in range(chunk - 1 if variant == "drt" else chunk):  # text of a whole chunk
                extend(model, torch.tensor([[token]]), state)
        said = chunk * decode_sent(model.config, size)
        assert sum(sent.bytes.values()) == pytest.approx(said, rel=1e-9), variant


@pytest.mark.slow
def test_decoding_sends_what_the_formula_says(tmp_path: Path) -> None:
    in_group(compare_decoding, 3, tmp_path, 3, ["hsa-ultralong", "drt"])
