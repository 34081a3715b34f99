"""Two gloo processes under torchrun: the same losses as one, and checkpoints that any number of processes loads."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import finish, losses, start
from small_runs import small_run, write_toml

from hsa_compile.model.pretrained import from_pretrained
from hsa_compile.model.training.checkpoint import SHARDS, checkpoints
from hsa_compile.model.training.processes import join_processes, leave_processes
from hsa_compile.model.training.run import CHECKPOINTS, MODEL

pytestmark = pytest.mark.slow
STEPS = 6


def config(tmp_path: Path, **train: object) -> str:
    """Noise is drawn by row of a process, so that equality needs a run without."""
    model = {"selection_noise": False}
    run = small_run(model=model, steps=STEPS, save_every=2, probe_every=3, probe_samples=2, **train)
    return str(write_toml(tmp_path / "run.toml", run))


def assert_close(one: dict[int, float], other: dict[int, float], most: float = 1e-5) -> None:
    assert one.keys() == other.keys() == set(range(1, STEPS + 1))
    assert max(abs(one[step] - other[step]) for step in one) <= most


def test_two_processes_equal_one(tmp_path: Path) -> None:
    file = config(tmp_path)
    finish(start(tmp_path / "one", "--config", file))
    finish(start(tmp_path / "two", "--config", file, "train.accumulation=2", num_processes=2))
    assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"))
    one, two = (from_pretrained(tmp_path / name / MODEL).state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)


def test_muon_sees_whole_matrices_in_two_processes(tmp_path: Path) -> None:
    file = config(tmp_path, optimizer="muon")
    finish(start(tmp_path / "one", "--config", file))
    finish(start(tmp_path / "two", "--config", file, "train.accumulation=2", num_processes=2))
    # It computes in bfloat16: losses differ by 1e-4, and by 2e-2 if each process makes its own part orthogonal.
    assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), most=1e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(before: int, after: int, tmp_path: Path) -> None:
    file = config(tmp_path)
    finish(start(tmp_path / "whole", "--config", file))
    finish(start(tmp_path / "moved", "--config", file, "--minutes", "0.0001", num_processes=before))
    assert 0 < max(losses(tmp_path / "moved")) < STEPS
    finish(start(tmp_path / "moved", "--resume", num_processes=after))
    assert_close(losses(tmp_path / "moved"), losses(tmp_path / "whole"))


@pytest.mark.exhaustive
def test_two_processes_go_on_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    file = config(tmp_path)
    finish(start(tmp_path / "whole", "--config", file, "train.save_every=2", num_processes=2))
    finish(start(tmp_path / "run", "--config", file, "train.save_every=2", "--minutes", "0.0001", num_processes=2))
    finish(start(tmp_path / "run", "--resume", num_processes=2))
    newest, *_, before = reversed(checkpoints(tmp_path / "run" / CHECKPOINTS))
    shards = sorted((newest / SHARDS).glob("*.safetensors"))
    whole = shards[-1].read_bytes()
    shards[-1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    finish(start(tmp_path / "run", "--resume", num_processes=2))
    assert newest.with_name(f"damaged-{newest.name}").is_dir()
    assert newest.is_dir()  # its step was made again, from the one before
    assert before.is_dir()
    assert_close(losses(tmp_path / "run"), losses(tmp_path / "whole"))


def test_processes_that_start_again_do_not_find_what_killed_ones_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torchrun` keeps its store, in which processes find each other's addresses, over a restart."""
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port),
             "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    stores = []
    init = dist.init_process_group
    monkeypatch.setattr(
        dist, "init_process_group", lambda *args, **more: stores.append(more["store"]) or init(*args, **more)
    )
    for restarts in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        assert join_processes().world_size == 1
        leave_processes()
    stores[0].set("address", "of a process that was killed")
    assert stores[0].check(["address"])
    assert not stores[1].check(["address"])
