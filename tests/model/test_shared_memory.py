"""Processes that hold one memory together read and continue texts as one process does, with the same logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import TIME_LIMIT, finish, in_group, launch
from small_models import build, small_config
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.evaluation.outcomes import OUTCOMES_FILE, OutcomeFile
from hsa_compile.model.inference.generate import generate
from hsa_compile.model.inference.inference import ModelState, extend, new_state, prefill
from hsa_compile.model.inference.parts import share_text
from hsa_compile.model.inference.reading import save_state
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


def hold_shares(size: int) -> None:
    """Each process holds its share, no chunk is lost, and tokens that come later go to them in turns."""
    mesh = init_device_mesh("cpu", (size,))
    shared.TURN = 3
    state = compare("hsa-ultralong", [[301], [131], [2], [2]], mesh)
    memory = state.memory
    assert isinstance(memory, SharedMemory)
    held: list[Any] = [None] * size
    dist.all_gather_object(held, memory.own.num_chunks[0])
    assert sum(held) == memory.num_chunks[0] == state.positions[0] // 6
    assert max(held) - min(held) <= 3 + size


def go_back(size: int) -> None:
    """Rewinding, taking rows and generating do what they do alone."""
    mesh, model = init_device_mesh("cpu", (size,)), build(small_config("hsa-ultralong"))
    question = texts(2, 131, 7)
    found: list[list[Any]] = []
    for state in (new_state(model, 2), new_state(model, 2, mesh=mesh)):
        prefill(model, texts(2, 211), state)
        extend(model, texts(2, 7, 5), state)
        point = snapshot(state)
        extend(model, texts(2, 6, 6), state)  # a chunk that the process of the newest one takes, and gives up again
        rewind(state, point)
        first = prefill(model, question, state)
        rewind(state, point)
        branch = take_rows(model, state, [1, 1, 0])
        drawn = generate(model, texts(3, 9, 3), max_new_tokens=6, temperature=1.5, seed=3, state=branch)
        again = prefill(model, question, state)
        torch.testing.assert_close(again, first, rtol=0, atol=TOLERANCE)
        found.append([first, drawn])
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=TOLERANCE)
    assert found[0][1] == found[1][1]


def refuse(size: int, directory: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    with pytest.raises(InvalidArgument, match="variant 'full' has no memory that several processes could share"):
        new_state(build(small_config("full")), mesh=mesh)
    model = build(small_config("drt"))
    with pytest.raises(InvalidArgument, match="a reading whose memory several processes share cannot be saved"):
        save_state(model, new_state(model, 2, mesh=mesh), directory / "reading")
    state = new_state(build(small_config("ramba")), 2, mesh=mesh)
    assert isinstance(state.memory, SharedMemory)
    with pytest.raises(InvalidArgument, match=r"counts = \[0, 1\] must be 2 integers of at most \[0, 0\]"):
        state.memory.truncate([0, 1])


def do_as_one(size: int, directory: Path) -> None:
    hold_shares(size)
    go_back(size)
    refuse(size, directory)
    compare("drt", [[97, 233]], init_device_mesh("cpu", (size,)))


def do_all_as_one(size: int, directory: Path) -> None:
    do_as_one(size, directory)
    mesh = init_device_mesh("cpu", (size,))
    for variant in ("hsa-ultralong", "drt", "ramba", "swa"):
        for readings in READINGS:
            compare(variant, readings, mesh)


@pytest.mark.slow
def test_two_processes_read_and_continue_as_one(tmp_path: Path) -> None:
    in_group(do_as_one, 2, tmp_path, 2, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_processes_reads_as_one(size: int, tmp_path: Path) -> None:
    in_group(do_all_as_one, size, tmp_path, size, tmp_path)


def said(*arguments: str, num_processes: int) -> str:
    return finish(launch(*arguments, num_processes=num_processes))


@pytest.mark.slow
def test_generate_writes_under_torchrun_what_it_writes_alone(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(bytes(97 + i * i % 23 for i in range(3001)) + b" abc=1234. ?abc=")
    command = ["generate", "--model", "tiny", "--prompt-file", str(prompt), "--max-new-tokens", "20"]
    command += ["--temperature", "1", "--seed", "3"]
    assert said(*command, num_processes=2) == said(*command, num_processes=1)


EVALUATION = ["eval", "--task", "s-niah", "--task", "ppl", "--haystack", "stdlib", "--lengths", "1k,8k",
              "--samples", "2", "--depths", "0.5", "--protocol", "both"]  # fmt: skip


@pytest.mark.exhaustive
def test_eval_finds_under_torchrun_what_it_finds_alone(tmp_path: Path) -> None:
    tables = [said(*EVALUATION, "--out", str(tmp_path / str(n)), num_processes=n) for n in (1, 3)]
    assert tables[0].replace(str(tmp_path / "1"), "") == tables[1].replace(str(tmp_path / "3"), "")
    found = [(tmp_path / str(n) / OUTCOMES_FILE).read_text() for n in (1, 3)]
    assert found[0].count("correct") == found[1].count("correct") == 8
    assert said(*EVALUATION, "--out", str(tmp_path / "1"), num_processes=2) == tables[0]  # nothing is left to do
    assert (tmp_path / "1" / OUTCOMES_FILE).read_text() == found[0]


@pytest.mark.exhaustive
def test_an_error_of_the_first_process_ends_all_with_its_reason(tmp_path: Path) -> None:
    with OutcomeFile(tmp_path):
        process = launch(*EVALUATION, "--out", str(tmp_path), num_processes=2)
        out, err = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 1
    assert not out
    assert f"error: another process evaluates into {tmp_path}" in err


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "tiny", "--prompt", "a", "--save-memory", "x"], "--save-memory is for one process"),
        (["generate", "--model", "tiny", "--prompt", "a", "--load-memory", "x"], "--load-memory is for one process"),
        (["generate", "--model", "tiny", "--random-weights", "--variant", "full", "--prompt", "a"],
         "variant 'full' has no memory that several processes could share"),
    ],
)  # fmt: skip
def test_what_several_processes_cannot_do_is_refused(arguments: list[str], message: str) -> None:
    process = launch(*arguments, num_processes=2)
    _, err = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 1
    assert f"error: {message}" in err


@pytest.mark.parametrize(
    ("num_new", "num_parts"), [([1000], 3), ([997, 13], 4), ([400, 401], 2), ([5000], 1000)]
)  # fmt: skip
@pytest.mark.parametrize("variant", ["hsa-ultralong", "drt"])
def test_parts_cover_all_chunks_and_set_in_early_enough(variant: str, num_new: list[int], num_parts: int) -> None:
    config = small_config(variant)
    positions = [0 if variant == "drt" else 13 * b for b in range(len(num_new))]
    places = [share_text(config, positions, num_new, part, num_parts, 25) for part in range(num_parts)]
    for b, (position, n) in enumerate(zip(positions, num_new, strict=True)):
        before, read = config.text_length(position), 0
        end = config.layer_position(before + n)
        for parts in places:
            assert parts is not None
            assert parts.first[b] == read
            read = parts.last[b]
            begin, early = config.layer_position(before + parts.first[b]), parts.early.positions[b]
            assert early == position or begin - early >= config.lower_reach
            assert position <= parts.end.positions[b] <= max(position, end - 25 - config.lower_reach)
            assert sum(parts.num_chunks[b]) == end // config.chunk_size - position // config.chunk_size
        assert 0 <= n - read < config.chunk_size


def test_a_short_text_is_read_by_all() -> None:
    assert share_text(small_config("hsa-ultralong"), [0], [60], 0, 2, 25) is None
