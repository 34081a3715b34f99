"""`hsa-compile eval` as a person meets it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from shell import Shell

from hsa_compile.model.evaluation import retrieval
from hsa_compile.model.tasks import unseen
from hsa_compile.model.tasks.family import TASKS
from hsa_compile.model.tasks.haystack import TextHaystack

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


@pytest.fixture
def corpus(run: Shell, tmp_path: Path) -> str:
    """Held-out text."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"line {number} of many words\n" * 60)
    assert run("prepare", str(folder), "--out", str(tmp_path / "prepared"), "--validation", "0.99").code == 0
    return str(tmp_path / "prepared")


def command(directory: Path, out: Path, *more: str) -> list[str]:
    return ["eval", "--model", str(directory), "--out", str(out), "--samples", "2", "--depths", "3", *more]


NEEDLE = ("--task", "s-niah")


def test_tasks_give_tables_files_and_pictures(run: Shell, directory: Path, corpus: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tasks = [word for task in ("s-niah", "mk-niah", "vt", "ppl") for word in ("--task", task)]
    shown = run(*command(directory, out, *tasks, "--lengths", "256,1k", "--haystack", corpus, "--protocol", "both"))
    assert shown.code == 0, shown.err
    for text in ("right answers in %, teacher-forced", "right answers in %, greedy", "at 50 %", "95 % interval", "1K",
                 "mean of 3", "by where in its chunk", "perplexity of the last 128 tokens"):  # fmt: skip
        assert text in shown.out
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    pictures = {"s-niah-noise.png", "mk-niah-prepared.png", "vt-noise.png"}
    assert names == {"samples.jsonl", "results.json", "results.csv", "ppl.png"} | pictures
    values = json.loads((out / "results.json").read_text())
    assert values["settings"]["text"] == {"name": "prepared", "split": "validation"}
    assert len(values["retrieval"]) == 3 * 2 * 2 * 4
    assert {cell["correct"] for cell in values["retrieval"]} == {0}
    assert [each["length"] for each in values["perplexity"]] == [256, 1024]


def test_all_tasks_are_asked_if_none_is_named_in_text_that_was_not_trained_on(
    run: Shell, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TextHaystack("packages", b"text of packages, never seen\n" * 9, {"sha256": "abc"})
    asked: list[str] = []
    monkeypatch.setattr(unseen, "packages_haystack", lambda corpus: asked.append(corpus) or text)
    words = ["--lengths", "2k", "--samples", "1", "--depths", "0.5", "--json"]
    shown = run(*command(directory, tmp_path / "out", *words))
    assert shown.code == 0, shown.err
    assert {cell["task"] for cell in shown.json["retrieval"]} == set(TASKS) == shown.json["tasks"].keys()
    assert shown.json["settings"]["text"] == {"name": "packages", "sha256": "abc"}
    assert [mean["tasks"] for mean in shown.json["means"]] == [len(TASKS)]
    assert asked == [""]  # the model does not say what it was trained on


def test_json_is_what_is_kept(run: Shell, directory: Path, tmp_path: Path) -> None:
    shown = run(*command(directory, tmp_path / "out", *NEEDLE, "--lengths", "128", "--json"))
    assert shown.code == 0
    assert shown.json == json.loads((tmp_path / "out" / "results.json").read_text())
    assert shown.json["protocols"].keys() == {"teacher-forced"}


def test_ctrl_c_keeps_what_is_finished(
    run: Shell, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = retrieval.answered, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(retrieval, "answered", interrupted)
    arguments = command(directory, tmp_path / "out", *NEEDLE, "--lengths", "200,300,400")
    stopped = run(*arguments)
    assert stopped.code == 130
    assert "run the same command to go on" in stopped.err
    before = len((tmp_path / "out" / "samples.jsonl").read_text().splitlines())
    assert before > 0
    assert run(*arguments).code == 0
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 3 * 3 * 2
    calls.append(1)
    count = len(calls)
    assert run(*arguments).code == 0
    assert len(calls) == count


# The command, which gets a signal right before it keeps outcomes for the second time.
ENDED = """
import os, sys
from hsa_compile.cli.main import main
from hsa_compile.model.evaluation.outcomes import OutcomeFile
number, real, calls = int(sys.argv.pop(1)), OutcomeFile.add, []
def add(*arguments):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), number)
    return real(*arguments)
OutcomeFile.add = add
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_killed_and_called_again_it_gives_the_same_results(
    number: int, run: Shell, directory: Path, tmp_path: Path
) -> None:
    flags = [*NEEDLE, "--lengths", "128,200", "--protocol", "both"]
    assert run(*command(directory, tmp_path / "whole", *flags)).code == 0
    arguments = command(directory, tmp_path / "killed", *flags)
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", ENDED, str(int(number)), *arguments])
    assert ended.returncode == (143 if number == signal.SIGTERM else -number)
    kept = [len((tmp_path / name / "samples.jsonl").read_text().splitlines()) for name in ("killed", "whole")]
    assert 0 < kept[0] < kept[1]
    assert run(*arguments).code == 0
    whole, again = ((tmp_path / name / "results.json").read_bytes() for name in ("whole", "killed"))
    assert again == whole


def test_where_the_memory_lies_changes_nothing(run: Shell, directory: Path, tmp_path: Path) -> None:
    arguments = [*NEEDLE, "--lengths", "1k", "--json", "--memory-dtype", "bf16", "--top-k", "3"]
    shown = [
        run(*command(directory, tmp_path / place, *arguments, "--memory", place))
        for place in ("device", "host", "disk")
    ]
    assert [each.code for each in shown] == [0, 0, 0]
    assert shown[0].json == shown[1].json == shown[2].json
    assert shown[0].json["settings"]["memory_dtype"] == "bfloat16"
    assert shown[0].json["settings"]["top_k"] == 3


def test_without_matplotlib_everything_else_is_there(
    run: Shell, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = run(*command(directory, tmp_path / "out", *NEEDLE, "--lengths", "128"))
    assert shown.code == 0
    assert shown.err.strip() == "no pictures: a picture needs matplotlib: pip install 'hsa-compile[plots]'"
    assert (tmp_path / "out" / "results.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "niah"], "niah"),
        (["--lengths", "4q"], "'4q' is not a positive integer"),
        (["--lengths", "0"], "'0' is not a positive integer"),
        ([*NEEDLE, "--lengths", "21"], "length 21 is too short for s-niah; the least allowed is 22"),
        (["--lengths", "4k,1k"], "length 1024 is too short for fwe; the least allowed is 2048"),
        (["--lengths", "4k,40", "--task", "vt"], "length 40 is too short for vt"),
        ([*NEEDLE, "--lengths", "100", "--min-distance", "90"], "the least allowed is 112"),
        (["--depths", "0,1.5"], "neither depths from 0 to 1"),
        (["--depths", "x"], "neither depths from 0 to 1"),
        (["--depths", "nan"], "neither depths from 0 to 1"),
        (["--depths", "1001"], "neither depths from 0 to 1"),
        (["--depths", "10005"], "neither depths from 0 to 1"),
        (["--samples", "0"], "0"),
        (["--haystack", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--protocol", "free"], "free"),
        (["--memory-dtype", "int8"], "int8"),
        (["--top-k", "100000"], "top_k = 100000"),
        (["--model", "small"], "has no trained weights; allowed are tiny and"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--task", "ppl", "--haystack", "/tmp"], "hsa-compile prepare wrote"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, run: Shell, directory: Path, tmp_path: Path
) -> None:
    refused = run("eval", "--model", str(directory), "--out", str(tmp_path / "out"), *arguments)
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    assert message in refused.err
    assert not (tmp_path / "out").exists()
