"""Processes that hold one memory together read and continue texts as one process does, with the same logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_group
from small_models import build, small_config
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hsa_compile.model.inference.generate import generate
from hsa_compile.model.inference.inference import ModelState, extend, new_state, prefill
from hsa_compile.model.inference.snapshot import rewind, snapshot, take_rows
from hsa_compile.model.memory import shared
from hsa_compile.model.memory.shared import SharedMemory
from hsa_compile.model.transformer import HSATransformer

TOLERANCE = 1e-5
# Lengths of the rows that are read one after another: far longer than parts, shorter than one, with empty parts.
READINGS: tuple[list[list[int]], ...] = ([[211]], [[3], [307], [2], [149]], [[97, 233], [160, 1]], [[23], [90]])


def texts(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(19, (batch, length), generator=torch.Generator().manual_seed(seed))


def read(model: HSATransformer, state: ModelState, readings: list[list[int]], piece: int) -> list[Tensor]:
    """Logits after each prefill, and of five tokens after that."""
    found = []
    for number, lengths in enumerate(readings):
        tokens = texts(len(lengths), max(lengths), number)
        found.append(prefill(model, tokens, state, lengths, piece=piece))
        found += [extend(model, token, state) for token in texts(len(lengths), 5, number + 100).split(1, dim=1)]
    return found


def compare(variant: str, readings: list[list[int]], mesh: DeviceMesh, **changes: Any) -> ModelState:
    model = build(small_config(variant, **changes))
    batch = len(readings[0])
    together = new_state(model, batch, mesh=mesh)
    expected = read(model, new_state(model, batch), readings, 4096)
    for one, other in zip(expected, read(model, together, readings, 16), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=TOLERANCE)
    return together


def read_alike(size: int, variants: list[str]) -> None:
    mesh = init_device_mesh("cpu", (size,))
    for variant in variants:
        for readings in READINGS:
            compare(variant, readings, mesh)


def hold_shares(size: int) -> None:
    """Each process holds its share, no chunk is lost, and tokens that come later go to them in turns."""
    mesh = init_device_mesh("cpu", (size,))
    shared.TURN = 3
    state = compare("hsa-ultralong", [[301], [131], [2], [2], [2], [2]], mesh)
    memory = state.memory
    assert isinstance(memory, SharedMemory)
    held: list[Any] = [None] * size
    dist.all_gather_object(held, memory.own.num_chunks[0])
    assert sum(held) == memory.num_chunks[0] == state.positions[0] // 5
    assert max(held) - min(held) <= 3 + size


def go_back(size: int) -> None:
    """Rewinding, taking rows and generating do what they do alone."""
    mesh, model = init_device_mesh("cpu", (size,)), build(small_config("hsa-ultralong"))
    question = texts(2, 131, 7)
    found: list[list[Any]] = []
    for state in (new_state(model, 2), new_state(model, 2, mesh=mesh)):
        prefill(model, texts(2, 211), state)
        point = snapshot(state)
        first = prefill(model, question, state)
        rewind(state, point)
        branch = take_rows(model, state, [1, 1, 0])
        drawn = generate(model, texts(3, 9, 3), max_new_tokens=12, temperature=1.5, seed=3, state=branch)
        again = prefill(model, question, state)
        torch.testing.assert_close(again, first, rtol=0, atol=TOLERANCE)
        found.append([first, drawn])
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=TOLERANCE)
    assert found[0][1] == found[1][1]


def together(size: int, thorough: bool) -> None:
    torch.manual_seed(0)
    hold_shares(size)
    go_back(size)
    read_alike(size, ["hsa-ultralong", "drt", "ramba", "swa"] if thorough else ["drt"])


@pytest.mark.slow
def test_two_processes_read_and_continue_as_one(tmp_path: Path) -> None:
    in_group(together, 2, tmp_path, 2, False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_processes_reads_as_one(size: int, tmp_path: Path) -> None:
    in_group(together, size, tmp_path, size, True)
