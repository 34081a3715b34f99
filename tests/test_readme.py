"""What the README shows, is there and runs."""

import re
from pathlib import Path

import pytest
from shown_commands import check_shown_commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CLAIM = """
assert o.shape == (1, length, heads, width)
assert all(x.grad.isfinite().all() and x.grad.norm() > 0 for x in (q, k, v, query))
"""


def test_it_is_one_screen_with_one_example() -> None:
    assert len(README.splitlines()) <= 130
    assert len(BLOCKS) == 1


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.filterwarnings("ignore::hsa_compile.errors.HSACompileWarning")
def test_the_python_example_runs_as_printed() -> None:
    exec(compile(BLOCKS[0] + CLAIM, "README.md", "exec"), {"__name__": "__readme__"})


def test_every_command_and_flag_that_is_shown_exists() -> None:
    fenced = re.findall(r"^```\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert check_shown_commands("\n".join(fenced)) >= 4
    shown = set(re.findall(r"(?:\$ |`)make ([a-z-]+)", README))
    assert {"tune", "test"} <= shown
    assert shown <= set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
