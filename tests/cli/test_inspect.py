"""`hsa-compile inspect`; what it compiles, in a process of its own, since this one interprets Triton kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shell import Shell

pytest.importorskip("triton")
SHAPE = ["--head-dim", "64", "--heads", "8", "--kv-heads", "2", "--chunk-size", "32"]
# Each element of a list is a command; printed are exit code, standard output and standard error of each.
SCRIPT = """
import json, sys
from click.testing import CliRunner
from hsa_compile.cli.kernels import inspect
said = []
for arguments in json.loads(sys.argv[1]):
    done = CliRunner().invoke(inspect, arguments)
    said.append((done.exit_code, done.stdout, done.stderr + str(done.exception or "")))
print(json.dumps(said))
"""


@pytest.mark.slow
def test_kernels_of_both_vendors_are_compiled_and_what_they_use_is_shown(tmp_path: Path) -> None:
    out = tmp_path / "texts"
    commands = [
        ["--target", "sm_90", "--op", "forward", *SHAPE, "--json", "--ptx", "--sass", "--out", str(out)],
        ["--target", "gfx942", "--op", "backward", *SHAPE],
        ["--target", "gfx942", "--op", "forward", *SHAPE, "--sass"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        capture_output=True, text=True, check=True, env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    nvidia, amd, no_sass = json.loads(done.stdout)
    assert (nvidia[0], amd[0]) == (0, 0), (nvidia, amd)
    rows = json.loads(nvidia[1])
    assert rows
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["spills"] == 0
        assert row["shared KB"] <= 227
    assert {row["matrix"] for row in rows} & {"HGMMA", "HMMA"}
    assert {path.suffix for path in out.iterdir()} == {".ptx", ".sass"}
    assert all(path.stat().st_size > 1000 for path in out.iterdir())
    assert "MFMA" in amd[1]
    assert no_sass[:2] == [1, ""]
    assert "--sass does not exist for this target" in no_sass[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_70"], "'sm_70' is not one of"),
        (["--matrix", "--head-dim", "64"], "--matrix and --head-dim exclude each other"),
        (["--schedule", "token num_warps=3 num_stages=2", "--op", "forward"], "num_warps = 3 is not one of"),
        (["--dtype", "fp64"], "float64"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, run: Shell) -> None:
    done = run("inspect", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_an_interpreting_process_says_that_it_cannot_compile(run: Shell) -> None:
    done = run("inspect", "--op", "forward", *SHAPE)
    assert done.code == 1
    assert "TRITON_INTERPRET" in done.err
