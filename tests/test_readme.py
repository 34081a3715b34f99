"""What the README prints, runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from shown_commands import check_shown_commands

README = Path(__file__).parents[1] / "README.md"
CLAIMS = {  # by the name that a block binds last
    "o": "assert o.shape == (B, T, HQ, D) and q.grad.norm() > 0 and torch.isfinite(q.grad).all()",
    "logits": "assert logits.shape == (1, 1, 256) and state.positions == [5001] and torch.isfinite(logits).all()",
}
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_python_example_runs_as_printed(block: str) -> None:
    claims = [claim for name, claim in CLAIMS.items() if f"{name} = " in block]
    assert claims, "a block that nothing is claimed of"
    script = block + "\n" + "\n".join(claims)
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_there_is_an_example() -> None:
    assert BLOCKS


@pytest.mark.slow
def test_the_way_from_tuning_to_answers_runs_as_printed(tmp_path: Path) -> None:
    fenced = re.findall(r"^```\w*\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    (lines,) = (block for block in fenced if "\nhsa-compile train" in block)
    environment = {**os.environ, "HSA_COMPILE_CACHE_DIR": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"}
    for line in lines.splitlines():
        words = shlex.split(line, comments=True)
        assert words.pop(0) == "hsa-compile"
        if words[0] == "tune":
            words += ["--trials", "1", "--timeout", "1"]
        if "--minutes" in words:
            words[words.index("--minutes") + 1] = "0.1"
        done = subprocess.run(
            [sys.executable, "-m", "hsa_compile", *words],
            capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())["retrieval"]


def test_every_command_and_flag_that_is_shown_exists() -> None:
    assert check_shown_commands(README.read_text()) >= 4
