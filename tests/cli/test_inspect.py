"""`hsa-compile inspect` in processes of its own, since this one interprets Triton kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SHAPE = ["--head-dim", "64", "--heads", "8", "--kv-heads", "2", "--chunk-size", "32"]


def inspect(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hsa_compile", "inspect", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_a_table_of_what_each_kernel_uses(tmp_path: Path) -> None:
    out = tmp_path / "texts"
    done = inspect("--target", "sm_90", "--op", "forward", *SHAPE, "--json", "--ptx", "--sass", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["spills"] == 0
        assert row["shared KB"] <= 227
    assert {row["matrix"] for row in rows} & {"HGMMA", "HMMA"}
    assert {path.suffix for path in out.iterdir()} == {".ptx", ".sass"}
    assert all(path.stat().st_size > 1000 for path in out.iterdir())


def test_amd_is_compiled_too() -> None:
    done = inspect("--target", "gfx942", "--op", "backward", *SHAPE)
    assert done.returncode == 0, done.stderr
    assert "MFMA" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_70"], "'sm_70' is not one of"),
        (["--matrix", "--head-dim", "64"], "leave the shape flags"),
        (["--schedule", "token num_warps=3 num_stages=2", "--op", "forward"], "num_warps = 3 is not one of"),
        (["--target", "gfx942", "--op", "forward", *SHAPE, "--sass"], "--sass does not exist for this target"),
        (["--dtype", "fp64"], "float64"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    done = inspect(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_interpreting_process_says_that_it_cannot_compile() -> None:
    done = inspect("--op", "forward", *SHAPE, interpret="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET" in done.stderr
