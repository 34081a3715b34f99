"""A process among several that is killed or has no room on its disk ends the run, which goes on where it was saved."""

import os
import random
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import TIME_LIMIT, finish, in_group, losses, num_lines, rank_pid, start, wait_until
from small_runs import small_run, write_toml

from hsa_compile.errors import SaveError, TrainingError
from hsa_compile.model.training.checkpoint import RunState, checkpoints, load_checkpoint, save_checkpoint
from hsa_compile.model.training.optimizer import make_optimizer
from hsa_compile.model.training.processes import Processes, saying_who_is_gone, shard
from hsa_compile.model.training.run import CHECKPOINTS
from hsa_compile.model.training.step import LossModel
from hsa_compile.model.transformer import HSATransformer

pytestmark = pytest.mark.exhaustive
PROCESSES, STEPS, KILLS = 2, 60, 10


@pytest.fixture
def config(tmp_path: Path) -> str:
    run = small_run(steps=STEPS, save_every=1, context_parallel=2, expert_parallel=2)
    return str(write_toml(tmp_path / "run.toml", run))


def kill(process: "subprocess.Popen[str]", out: Path, draw: random.Random) -> int:
    """Kills a rank some steps on, between checkpoints or in the middle of one."""
    rank, lines, in_saving = draw.randrange(PROCESSES), num_lines(out) + draw.randint(0, 4), draw.random() < 0.5
    wait_until(lambda: num_lines(out) > lines and rank_pid(process, rank) is not None, process)
    if in_saving:
        wait_until(lambda: any((out / CHECKPOINTS).glob(".step-*.new")), process)
    pid = rank_pid(process, rank)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return rank


def test_killed_ranks_end_the_run_which_goes_on_with_the_same_losses(config: str, tmp_path: Path) -> None:
    whole, out, draw = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    finish(start(whole, "--config", config, num_processes=PROCESSES))
    for _ in range(KILLS):
        process = start(out, "--config", config, "--resume", num_processes=PROCESSES)
        rank = kill(process, out, draw)
        _, err = process.communicate(timeout=TIME_LIMIT)
        assert process.returncode == 1
        cause = err.partition("Root Cause")[2]
        assert f"rank      : {rank} " in cause, err
        assert "(SIGKILL)" in cause
    finish(start(out, "--resume", num_processes=PROCESSES))
    assert losses(out) == losses(whole)


def test_torchrun_starts_again_where_the_killed_run_was_saved(config: str, tmp_path: Path) -> None:
    whole, out, draw = tmp_path / "whole", tmp_path / "killed", random.Random(1)
    finish(start(whole, "--config", config, num_processes=PROCESSES))
    process = start(out, "--config", config, "--resume", num_processes=PROCESSES, restarts=1)
    kill(process, out, draw)
    finish(process)
    assert losses(out) == losses(whole)


def lose_the_first(processes: int) -> None:
    """The first process ends without a word; each other one says so, in one line."""
    own = Processes(rank=dist.get_rank(), world_size=processes, device=torch.device("cpu"))
    own.wait()
    if own.is_first:
        os._exit(0)
    with (
        pytest.raises(TrainingError, match=f"^process {own.rank} of {processes} lost another one; .* --resume goes on"),
        saying_who_is_gone(own),
    ):
        own.sum(torch.ones(1))
    os._exit(0)  # the group can no longer be left in order


def test_a_process_says_that_another_one_is_gone(tmp_path: Path) -> None:
    in_group(lose_the_first, 3, tmp_path, 3)


def save_without_room(directory: Path, rank: int) -> None:
    """Two checkpoints, for the second of which one of the processes has no room: all of them hear so."""
    processes = Processes(rank=dist.get_rank(), world_size=PROCESSES, device=torch.device("cpu"))
    run = small_run()
    torch.manual_seed(0)
    model = HSATransformer(run.model)
    shard(LossModel(model, run.train.loss_chunk), model, processes)
    optimizer = make_optimizer(model, run.train)
    first = save_checkpoint(directory, RunState(step=1), model, optimizer, processes)
    if processes.rank == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails with EFBIG then, as with ENOSPC on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(
        SaveError, match=rf"step-00000002 cannot be written \(process {rank}: \[Errno 27\] .*untouched$"
    ):
        save_checkpoint(directory, RunState(step=2), model, optimizer, processes)
    dist.barrier()
    assert checkpoints(directory) == [first]
    assert not list(directory.glob(".*"))
    assert load_checkpoint(first, model, optimizer, processes).step == 1


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_a_full_disk_of_one_process_is_an_error_of_all(rank: int, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    in_group(save_without_room, PROCESSES, tmp_path, tmp_path / "checkpoints", rank)


def test_a_folder_that_the_first_process_cannot_replace_is_an_error_of_all(tmp_path: Path) -> None:
    in_group(save_into_a_file, PROCESSES, tmp_path, tmp_path / "file")


def save_into_a_file(root: Path) -> None:
    """The root is a file: the first process cannot begin."""
    processes = Processes(rank=dist.get_rank(), world_size=PROCESSES, device=torch.device("cpu"))
    if processes.is_first:
        root.write_text("")
    processes.wait()
    model = torch.nn.Linear(2, 2)
    with pytest.raises(SaveError, match="step-00000001 cannot be written"):
        save_checkpoint(root, RunState(step=1), model, torch.optim.AdamW(model.parameters()), processes)
