"""Four processes that share rows, experts or both compute what one computes; a run goes on in another arrangement."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import finish, in_group, losses, start
from small_models import build, small_config
from small_runs import Trainer, small_run, write_toml
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import VARIANTS
from hsa_compile.model.layers.exchange import SharedRows, share_rows
from hsa_compile.model.layers.hs_attention import Selection
from hsa_compile.model.layers.moe import MoE
from hsa_compile.model.training.config import RunConfig
from hsa_compile.model.training.processes import Processes, with_meshes
from hsa_compile.model.transformer import HSATransformer

PROCESSES = 4
CPU = torch.device("cpu")
# A length that parts of whole chunks divide, one that they do not, one chunk a process.
ROWS: tuple[tuple[int, dict[str, Any]], ...] = (
    (72, {"in_batch_memory": True, "sources": torch.arange(144).view(2, 72) % 37 - 5}), (43, {}), (22, {})
)  # fmt: skip
STAGES = [
    {"share": 0.5, "min_seq_len": 50, "seq_len": 70, "batch_tokens": 400},
    {"share": 0.5, "min_seq_len": 60, "seq_len": 90, "batch_tokens": 400, "window": 12, "top_k": 2},
]
MESHES = ((4, 1), (2, 1), (2, 2), (1, 4), (4, 4))
WAYS = ("gather", "travel")


def gradients(model: HSATransformer, tokens: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's output at this process's part of the rows, and the gradient of a function of it."""
    model.zero_grad()
    selections: list[Selection] = []
    hidden = model.hidden(tokens, selections=selections, **options)
    own = model.own_text(tokens.shape[1])
    shape = (*tokens.shape, hidden.shape[2])
    factors = torch.randn(shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(1))
    losses = [chosen.losses.sum() for chosen in selections if chosen.losses is not None]
    ((hidden * factors[:, own]).sum() + sum(losses)).backward()
    found = {name: torch.zeros_like(weight) if weight.grad is None else weight.grad
             for name, weight in model.named_parameters()}  # fmt: skip
    return hidden.detach(), found


def compare_rows() -> None:
    variants = (variant for variant in VARIANTS if variant != "full")
    for variant, way, recomputes in itertools.product(variants, WAYS, (False, True)):
        whole = build(small_config(variant, selection_noise=True), torch.float64)
        shared = copy.deepcopy(whole).train(recomputes)
        shared.checkpoint_activations, shared.chunk_exchange = recomputes, way
        shared.context_mesh = init_device_mesh("cpu", (PROCESSES,))
        for length, options in ROWS:
            options = {"noise_seed": 5, **options}
            tokens = torch.randint(19, (2, length), generator=torch.Generator().manual_seed(length))
            expected, expected_gradients = gradients(whole, tokens, **options)
            hidden, found = gradients(shared, tokens, **options)
            torch.testing.assert_close(hidden, expected[:, shared.own_text(length)])
            for name, gradient in found.items():
                dist.all_reduce(gradient)
                torch.testing.assert_close(
                    gradient, expected_gradients[name], msg=lambda text, at=name: f"{at}: {text}"
                )


@pytest.mark.exhaustive
def test_shared_rows_equal_whole_ones(tmp_path: Path) -> None:
    in_group(compare_rows, PROCESSES, tmp_path)


def steps(run: RunConfig, processes: Processes) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of each step of a run.

    In float32, rounding may turn a choice of chunks or experts, and does in some runs on some CPUs.
    """
    torch.manual_seed(0)
    trainer = Trainer(run, processes, torch.float64)
    results = [trainer.step(number) for number in range(run.train.steps)]
    return [(result.loss, result.grad_norm) for result in results]


def compare_steps(number: int, variants: dict[str, tuple[tuple[int, int], ...]], ways: tuple[str, ...] = WAYS) -> None:
    together = Processes(rank=dist.get_rank(), world_size=PROCESSES, device=CPU)
    for variant, meshes in variants.items():
        model = {"selection_noise": False, "variant": variant}
        alone = steps(small_run(model=model, stages=STAGES, steps=number), Processes(device=CPU))
        expected = torch.tensor(alone, dtype=torch.float64)
        for (context, experts), way in itertools.product(meshes, ways):
            train = {"context_parallel": context, "expert_parallel": experts, "chunk_exchange": way}
            run = small_run(model=model, stages=STAGES, steps=number, **train)
            found = torch.tensor(steps(run, together), dtype=torch.float64)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, msg=lambda text: f"{run.train}: {text}")  # noqa: B023


def check_load() -> None:
    """An expert's bias follows the load in all processes together."""
    moe = MoE(8, num_experts=2, experts_per_token=1, expert_dim=8)
    moe.load.copy_(torch.tensor([5, 0] if dist.get_rank() == 0 else [0, 7]))
    moe.update_bias(1.0)
    assert moe.balance_bias.tolist() == [1, -1]


def check_load_and_steps() -> None:
    check_load()
    compare_steps(2, {"hsa-ultralong": ((2, 2),)})


@pytest.mark.slow
def test_four_processes_share_the_load_and_make_the_steps_of_one(tmp_path: Path) -> None:
    in_group(check_load_and_steps, PROCESSES, tmp_path)


@pytest.mark.exhaustive
def test_every_arrangement_makes_the_steps_of_one(tmp_path: Path) -> None:
    rivals = dict.fromkeys(("drt", "ramba", "swa"), ((4, 1), (2, 2)))
    in_group(compare_steps, PROCESSES, tmp_path, 20, {"hsa-ultralong": MESHES, **rivals})


@pytest.mark.exhaustive
def test_a_run_goes_on_in_other_arrangements(tmp_path: Path) -> None:
    file = str(write_toml(tmp_path / "run.toml", small_run(model={"selection_noise": False}, stages=STAGES, steps=8)))
    finish(start(tmp_path / "whole", "--config", file))
    first = ["--config", file, "train.context_parallel=2", "train.expert_parallel=2", "--minutes", "0.0001"]
    finish(start(tmp_path / "moved", *first, num_processes=4))
    others = ["train.context_parallel=1", "train.expert_parallel=4", "--minutes", "0.0001"]
    finish(start(tmp_path / "moved", "--resume", *others, num_processes=4))
    assert 0 < max(losses(tmp_path / "moved")) < 8
    finish(start(tmp_path / "moved", "--resume", "train.expert_parallel=1"))
    whole, moved = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert whole.keys() == moved.keys()
    assert max(abs(whole[step] - moved[step]) for step in whole) <= 1e-5


class FourDevices:
    """As much of a mesh as sharing rows asks for."""

    def size(self) -> int:
        return 4


@pytest.mark.parametrize(
    ("length", "bounds"),
    [(64, (0, 16, 32, 48, 64)), (60, (0, 16, 32, 48, 60)), (41, (0, 8, 24, 32, 41)), (25, (0, 8, 16, 24, 25))],
)
def test_parts_begin_at_chunks(length: int, bounds: tuple[int, ...]) -> None:
    shared = share_rows(FourDevices(), length, 8)  # type: ignore[arg-type]
    assert shared.bounds == bounds
    assert SharedRows(mesh=shared.mesh, bounds=bounds).in_units(8).bounds == tuple(bound // 8 for bound in bounds)


def test_rows_of_fewer_chunks_than_processes_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="a row of 24 tokens has 3 chunks of 8"):
        share_rows(FourDevices(), 24, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({}, {"context_parallel": 3}, "train.context_parallel = 3 must divide the number of processes, 4"),
        ({}, {"expert_parallel": 8}, "train.expert_parallel = 8 must divide the number of processes, 4"),
        ({"num_experts": 6}, {"expert_parallel": 4}, "train.expert_parallel = 4 must divide model.num_experts = 6"),
        ({"variant": "full"}, {"context_parallel": 2}, "not possible with variant 'full'"),
    ],
)
def test_arrangements_that_do_not_divide_are_refused(
    model: dict[str, Any], train: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        with_meshes(Processes(world_size=4, device=CPU), small_run(model=model, **train))


@pytest.mark.parametrize("name", ["context_parallel", "expert_parallel"])
def test_sharing_does_not_go_together_with_compile(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"train.{name} = 2 does not go together with train.compile"):
        small_run(compile=True, **{name: 2})
