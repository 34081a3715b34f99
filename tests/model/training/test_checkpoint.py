"""Checkpoints are whole or not there, keep the last and the best, and refuse what is foreign."""

import json
import os
from pathlib import Path

import pytest
import torch
from small_runs import small_run

from hsa_compile.errors import HSACompileWarning, SaveError
from hsa_compile.files import file_sha256, read_summed_json, write_summed_json
from hsa_compile.model.tensor_files import read_tensors, write_tensors
from hsa_compile.model.training import checkpoint as checkpoint_module
from hsa_compile.model.training.checkpoint import (
    STATE_FILE,
    TENSORS_FILE,
    RunState,
    best_checkpoint,
    checkpoint_path,
    checkpoints,
    load_checkpoint,
    load_newest,
    prune,
    read_state,
    remove_leftovers,
    save_checkpoint,
)
from hsa_compile.model.training.config import OPTIMIZERS
from hsa_compile.model.training.optimizer import make_optimizer
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.transformer import HSATransformer


def made(
    seed: int = 0, optimizer: str = "adamw", **model_changes: object
) -> tuple[HSATransformer, torch.optim.Optimizer]:
    run = small_run(model=model_changes, optimizer=optimizer)
    torch.manual_seed(seed)
    model = HSATransformer(run.model)
    chosen = make_optimizer(model, run.train)
    for weight in model.parameters():
        weight.grad = torch.rand_like(weight)
    chosen.step()
    return model, chosen


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_all_comes_back(kind: str, tmp_path: Path, alone: Processes) -> None:
    model, optimizer = made(optimizer=kind)
    state = RunState(step=7, tokens=100, seconds=1.5, stage=1, metrics_bytes=12, score=0.25, data_digest="abc")
    path = save_checkpoint(tmp_path, state, model, optimizer, alone)
    drawn = torch.rand(3)

    other, other_optimizer = made(seed=1, optimizer=kind)
    assert load_checkpoint(path, other, other_optimizer, alone) == state
    assert torch.equal(torch.rand(3), drawn)  # PyTorch's random state, too
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[one].keys() == other_optimizer.state[two].keys() != set()
        for name, tensor in optimizer.state[one].items():
            assert torch.equal(tensor, other_optimizer.state[two][name])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_that_made_no_step_yet_can_be_loaded_into(kind: str, tmp_path: Path, alone: Processes) -> None:
    model, optimizer = made(optimizer=kind)
    path = save_checkpoint(tmp_path, RunState(), model, optimizer, alone)
    fresh = HSATransformer(small_run().model)
    fresh_optimizer = make_optimizer(fresh, small_run(optimizer=kind).train)
    load_checkpoint(path, fresh, fresh_optimizer, alone)
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        one.grad = two.grad = torch.ones_like(two)
    optimizer.step()
    fresh_optimizer.step()
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path, alone: Processes) -> None:
    model, optimizer = made()
    for step, score in ((1, 0.9), (2, 0.1), (3, None), (4, 0.5), (5, 0.6)):
        save_checkpoint(tmp_path, RunState(step=step, score=score), model, optimizer, alone)
    assert best_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2)
    prune(tmp_path, 2)
    assert [read_state(path).step for path in checkpoints(tmp_path)] == [2, 4, 5]


def test_a_save_that_fails_leaves_the_others_and_no_part_of_its_own(
    tmp_path: Path, alone: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = made()
    save_checkpoint(tmp_path, RunState(step=1), model, optimizer, alone)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write_summed_json", "sync_directory"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module, name, fail)
            if name == "sync_directory":  # whole by then, though perhaps not on the disk
                patch.setattr(Path, "replace", fail)
            with pytest.raises(SaveError, match="No space left"):
                save_checkpoint(tmp_path, RunState(step=2), model, optimizer, alone)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    load_checkpoint(checkpoint_path(tmp_path, 1), model, optimizer, alone)


def test_what_a_killed_process_left_is_not_a_checkpoint_and_goes(tmp_path: Path) -> None:
    for name in (".step-00000003.new", ".step-00000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
    assert checkpoints(tmp_path) == []
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, alone: Processes, size: int) -> None:
    model, optimizer = made()
    path = save_checkpoint(tmp_path, RunState(step=1), model, optimizer, alone) / TENSORS_FILE
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(SaveError, match=TENSORS_FILE):
        load_checkpoint(path.parent, model, optimizer, alone)


@pytest.mark.parametrize("name", [STATE_FILE, TENSORS_FILE])
def test_a_flipped_bit_is_found_and_its_file_named(tmp_path: Path, alone: Processes, name: str) -> None:
    model, optimizer = made()
    path = save_checkpoint(tmp_path, RunState(step=1), model, optimizer, alone) / name
    whole = path.read_bytes()
    for place in range(1, len(whole), len(whole) // 9):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(SaveError, match=name):
            load_checkpoint(path.parent, model, optimizer, alone)
    path.write_bytes(whole)
    load_checkpoint(path.parent, model, optimizer, alone)


def test_a_file_that_came_or_went_is_named(tmp_path: Path, alone: Processes) -> None:
    model, optimizer = made()
    path = save_checkpoint(tmp_path, RunState(step=1), model, optimizer, alone)
    (path / "more").touch()
    with pytest.raises(SaveError, match=r"step-00000001 is damaged: more is not what state\.json describes"):
        load_checkpoint(path, model, optimizer, alone)
    (path / "more").unlink()
    (path / TENSORS_FILE).unlink()
    with pytest.raises(SaveError, match=TENSORS_FILE):
        load_checkpoint(path, model, optimizer, alone)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, alone: Processes) -> None:
    path = save_checkpoint(tmp_path, RunState(step=1), *made(), alone)
    with pytest.raises(SaveError, match="of another model"):
        load_checkpoint(path, *made(ffn_dim=32), alone)


@pytest.mark.parametrize("values", [{}, {"format_version": 3}, {"format_version": 2, "step": 3}])
def test_a_foreign_state_is_refused(tmp_path: Path, values: dict[str, int]) -> None:
    write_summed_json(tmp_path / STATE_FILE, values)
    with pytest.raises(SaveError, match="is no checkpoint of this version"):
        read_state(tmp_path)
    (tmp_path / STATE_FILE).write_text(json.dumps(values))
    with pytest.raises(SaveError, match="has no checksum; another program or version"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("step", "3"), ("step", -1), ("tokens", 1.5), ("seconds", None), ("score", True), ("data_digest", 7)],
)
def test_a_state_of_other_types_is_refused(tmp_path: Path, alone: Processes, name: str, value: object) -> None:
    path = save_checkpoint(tmp_path, RunState(step=1), *made(), alone) / STATE_FILE
    write_summed_json(path, {**read_summed_json(path), name: value})
    with pytest.raises(SaveError, match=f"{name} = "):
        read_state(path.parent)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path: Path, alone: Processes) -> None:
    model, optimizer = made()
    paths = [save_checkpoint(tmp_path, RunState(step=step), model, optimizer, alone) for step in (1, 2, 3, 4)]
    tensors = read_tensors(paths[1] / TENSORS_FILE)
    del tensors["random.cpu"]
    write_tensors(paths[1] / TENSORS_FILE, tensors, {})
    files = {TENSORS_FILE: file_sha256(paths[1] / TENSORS_FILE)}
    write_summed_json(paths[1] / STATE_FILE, {**read_summed_json(paths[1] / STATE_FILE), "files": files})
    (paths[2] / STATE_FILE).write_text("[" * 200_000)
    os.truncate(paths[3] / TENSORS_FILE, 100)
    assert best_checkpoint(tmp_path) is None
    with pytest.raises(SaveError, match="step-00000004"):
        load_newest(paths[1:], model, optimizer, alone)
    with pytest.warns(HSACompileWarning) as caught:
        assert load_newest(paths, model, optimizer, alone).step == 1
    messages = [str(warning.message) for warning in caught]
    assert [path.name in message for path, message in zip(paths[:0:-1], messages, strict=True)] == [True] * 3
    assert "random.cpu is missing" in messages[-1]
    assert checkpoints(tmp_path) == paths[:1]
