"""What the README prints, runs."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from shown_commands import check_shown_commands

from hsa_compile.cli.main import main

README = Path(__file__).parents[1] / "README.md"
CLAIMS = {  # by the name that a block binds last
    "o": "assert o.shape == (B, T, HQ, D) and q.grad.norm() > 0 and torch.isfinite(q.grad).all()",
    "logits": "assert logits.shape == (1, 1, 256) and state.positions == [5001] and torch.isfinite(logits).all()",
}
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.filterwarnings("ignore::hsa_compile.errors.HSACompileWarning")
@pytest.mark.parametrize("block", BLOCKS)
def test_the_python_example_runs_as_printed(block: str) -> None:
    claims = [claim for name, claim in CLAIMS.items() if f"{name} = " in block]
    assert claims, "a block that nothing is claimed of"
    exec(compile(block + "\n" + "\n".join(claims), "README.md", "exec"), {"__name__": "__readme__"})


def test_there_is_an_example() -> None:
    assert BLOCKS


@pytest.mark.slow
@pytest.mark.usefixtures("without_compiler")
@pytest.mark.filterwarnings("ignore::hsa_compile.errors.HSACompileWarning")
@pytest.mark.parametrize(
    "small", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["small", "as-printed"]
)
def test_the_way_from_tuning_to_answers_runs_as_printed(
    small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fenced = re.findall(r"^```\w*\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    (lines,) = (block for block in fenced if "\nhsa-compile train" in block)
    for line in lines.splitlines():
        words = shlex.split(line, comments=True)
        if words[1] == "tune":
            words += ["--trials", "1", "--timeout", "1", "--in-process"]
        if "--minutes" in words:
            words[words.index("--minutes") + 1] = "0.001" if small else "0.1"
        if small and "--preset" in words:
            words += ["--seq-len", "256"] if words[1] == "tune" else ["--steps", "1"]
        if small and "--lengths" in words:
            words[words.index("--lengths") + 1] = "256"
            words[words.index("--samples") + 1] = "1"
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, line
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())["retrieval"]


def test_every_command_and_flag_that_is_shown_exists() -> None:
    assert check_shown_commands(README.read_text()) >= 4
