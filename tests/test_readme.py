"""What the README prints, runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_every_command_and_flag_that_is_shown_exists() -> None:
    shown = re.findall(r"^hsa-compile (.+?)(?:\s+#.*)?$", README.read_text(), re.MULTILINE)
    assert len(shown) >= 4
    for line in shown:
        words = line.split()
        command = [word for word in words[:2] if not word.startswith("-")]
        done = subprocess.run(
            [sys.executable, "-m", "hsa_compile", *command, "--help"],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        for flag in re.findall(r"--[a-z-]+", line):
            assert flag in done.stdout, f"{flag} of '{line}'"
