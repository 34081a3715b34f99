"""Runs that are killed, stopped or out of disk, in processes of their own."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import finish, losses, num_lines, start, wait_until
from small_runs import small_run, write_toml

from hsa_compile.model.pretrained import from_pretrained
from hsa_compile.model.training.run import MODEL

pytestmark = pytest.mark.slow
STEPS = 30


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(write_toml(tmp_path / "run.toml", small_run(steps=STEPS, save_every=3)))


@pytest.mark.exhaustive
def test_a_run_killed_again_and_again_has_the_same_losses(config: str, tmp_path: Path) -> None:
    finish(start(tmp_path / "whole", "--config", config))
    for lines in (1, 12, 25):
        process = start(tmp_path / "killed", "--config", config, "--resume")
        wait_until(lambda lines=lines: num_lines(tmp_path / "killed") >= lines, process)
        process.kill()
        process.communicate()
    finish(start(tmp_path / "killed", "--resume"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGTERM, 0, marks=pytest.mark.exhaustive), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_says_how_to_go_on(number: int, code: int, config: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, "--config", config, "train.save_every=0", "train.steps=100000")
    wait_until(lambda: num_lines(out) >= 5, process)
    process.send_signal(number)
    said = finish(process, code)
    done = max(losses(out))
    assert f"stopped and saved after step {done} of 100000; to go on: hsa-compile train --out {out} --resume" in said
    assert (out / "checkpoints" / f"step-{done:08d}").is_dir()
    from_pretrained(out / MODEL)


@pytest.mark.exhaustive
def test_a_full_disk_is_named_and_the_checkpoint_before_goes_on(config: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, "--config", config, "train.save_every=3", "--minutes", "0.001")
    finish(process)
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    limited = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "hsa_compile", "train", "--out", str(out), "--resume"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 10, size // 10)),
    )
    assert limited.returncode == 1, limited
    assert limited.stderr.splitlines()[-1].startswith("error: ")
    assert "cannot be written" in limited.stderr
    finish(start(out, "--resume"))
    assert max(losses(out)) == STEPS
