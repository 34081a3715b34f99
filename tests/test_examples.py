"""Every example runs as it stands, and what it prints is so."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(*command: str, **changes: str) -> str:
    """What an example prints; it must end well and say nothing to standard error."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **changes}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_what_one_sees(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert "rinted" in docstring


def test_all_examples_are_run_here() -> None:
    run = set(re.findall(r'"(\w+\.(?:py|sh))"', Path(__file__).read_text()))
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")} == run


@pytest.mark.slow
@pytest.mark.usefixtures("without_compiler")
@pytest.mark.filterwarnings("ignore")
def test_examples_run_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    run_path(str(EXAMPLES / "attention_layer.py"))["main"](steps=2)
    assert re.findall(r"(with the op|without it) +right answers", capsys.readouterr().out) == [
        "with the op",
        "without it",
    ]
    run_path(str(EXAMPLES / "ask_a_long_text.py"))["main"](length=2048, questions=1)
    assert capsys.readouterr().out.endswith("1 of 1 right\n")
    pytest.importorskip("transformers")
    run_path(str(EXAMPLES / "huggingface_swap.py"))["main"]()
    assert capsys.readouterr().out.endswith("as by hand: True\n")
    run_path(str(EXAMPLES / "huggingface_generate.py"))["main"](length=1024, questions=2, tokens=2)
    answers, _, times = capsys.readouterr().out.partition("2 of 2 right\npadding before a text changes")
    assert answers.count("  right\n") == 2
    assert "1,024 bytes are read in" in times


@pytest.mark.exhaustive
def test_only_the_layer_with_the_op_learns_what_is_far_away() -> None:
    lines = output_of(sys.executable, "attention_layer.py").splitlines()
    shares = [[int(share) for share in re.findall(r"(\d+)%", line)] for line in lines]
    (_, with_op), (_, without) = shares
    assert with_op >= 90
    assert without <= 40  # one of eight, by chance


@pytest.mark.exhaustive
def test_a_swapped_llama_keeps_short_texts_trains_and_generates() -> None:
    pytest.importorskip("transformers")
    swapped, trained, generated = output_of(sys.executable, "huggingface_swap.py").splitlines()
    assert float(re.search(r"differ by (\S+) at most", swapped).group(1)) < 1e-5  # type: ignore[union-attr]
    assert all(float(number) > 0 for number in re.findall(r"\d\.\de[+-]\d\d", trained))
    assert len(re.findall(r"\d\.\de[+-]\d\d", trained)) == 2
    assert generated.endswith("as by hand: True")


@pytest.mark.exhaustive
def test_a_text_that_was_read_once_is_asked_several_times() -> None:
    read, *answers, last = output_of(
        sys.executable, "ask_a_long_text.py", "--length", "32768", "--questions", "4"
    ).splitlines()
    assert read.startswith("read 32,768 bytes")
    assert len(answers) == 4
    right = [re.fullmatch(r"\?\w{3}= \d{4}  right  \(\d+ ms\)", line) is not None for line in answers]
    assert last == f"{sum(right)} of 4 right"
    assert sum(right) >= 3


@pytest.mark.exhaustive
def test_two_hosts_share_the_trials_of_one_study() -> None:
    out = output_of("bash", "two_hosts.sh", PYTHON=sys.executable, TRIALS="12", CXX="there-is-none")
    first, second, *studies = out.splitlines()
    assert re.match(r"first host: hsa_forward .* ms, .*the default", first)
    assert re.match(r"second host: hsa_forward .* ms, .*the default", second)
    # Where one process begins after the other has ended, its search is a new one.
    for line in studies:
        total, parts = re.search(r": (\d+) candidates, ([\d +]+) by", line).groups()  # type: ignore[union-attr]
        assert int(total) == sum(map(int, parts.split(" + "))) <= 12
    assert 1 <= len(studies) <= 2
