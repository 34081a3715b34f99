"""`generate` as a person meets it: text on standard output, the rest on standard error."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from shell import Shell

from hsa_compile.model.inference.generate import generate
from hsa_compile.model.presets import preset
from hsa_compile.model.pretrained import from_pretrained, save_pretrained
from hsa_compile.model.transformer import HSATransformer

PROMPT = "The quick brown fox jumps over the lazy dog. " * 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model whose weights are so large that its choices are clear."""
    torch.manual_seed(0)
    model = HSATransformer(preset("tiny"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    path = tmp_path_factory.mktemp("model")
    save_pretrained(model, path)
    return path


def new_bytes(model: HSATransformer, prompt: str, count: int) -> bytes:
    return bytes(generate(model, torch.tensor(list(prompt.encode())), max_new_tokens=count)[0])


@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
def test_the_text_is_that_of_the_model(run: Shell, directory: Path) -> None:
    expected = new_bytes(from_pretrained(directory), PROMPT, 30)
    shown = run("generate", "--model", str(directory), "--prompt", PROMPT, "--max-new-tokens", "30")
    assert shown.code == 0
    assert shown.out == expected.split(b"\0")[0].decode(errors="replace") + "\n"


def test_a_prompt_comes_from_a_file_or_from_standard_input(
    run: Shell, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt").write_bytes(PROMPT.encode() + b"\xff\xfe")
    arguments = ["generate", "--model", str(directory), "--max-new-tokens", "9", "--temperature", "2", "--prompt-file"]
    from_file = run(*arguments, str(tmp_path / "prompt"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "prompt").read_bytes())))
    from_input = run(*arguments, "-")
    assert (from_file.code, from_input.code) == (0, 0)
    assert from_file.out == from_input.out


def test_seeds_repeat_and_differ(run: Shell, directory: Path) -> None:
    arguments = ["generate", "--model", str(directory), "--prompt", PROMPT, "--max-new-tokens", "20",
                 "--temperature", "3", "--top-p", "0.99", "--seed"]  # fmt: skip
    texts = [run(*arguments, seed).out for seed in ("5", "5", "6")]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_text_ends_it_and_is_not_shown(run: Shell, directory: Path) -> None:
    arguments = ["generate", "--model", str(directory), "--prompt", PROMPT, "--max-new-tokens", "30"]
    whole = run(*arguments).out
    stop = whole[4:6]
    assert run(*arguments, "--stop", stop, "--stop", "never there").out == whole[: whole.index(stop)] + "\n"


@pytest.mark.parametrize("memory", ["device", "host", "disk"])
def test_a_book_is_read_once_and_asked_many_times(memory: str, run: Shell, directory: Path, tmp_path: Path) -> None:
    book = tmp_path / "book"
    read = run("generate", "--model", str(directory), "--prompt", PROMPT, "--max-new-tokens", "0",
               "--save-memory", str(book), "--memory", memory,
               *(["--memory-dir", str(tmp_path / "pages")] if memory == "disk" else []))  # fmt: skip
    assert (read.code, read.out) == (0, "")
    assert f"read {len(PROMPT)} tokens" in read.err
    whole = run("generate", "--model", str(directory), "--prompt", PROMPT + "Who?", "--max-new-tokens", "12")
    for _ in range(2):
        asked = run("generate", "--model", str(directory), "--load-memory", str(book), "--prompt", "Who?",
                    "--max-new-tokens", "12", "--memory", memory)  # fmt: skip
        assert asked.code == 0
        assert asked.out == whole.out


def test_the_shipped_model_finds_what_the_prompt_holds(run: Shell) -> None:
    haystack = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n" * 20
    prompt = f"{haystack} qxz=5071. {haystack} ?qxz="
    found = run("generate", "--model", "tiny", "--prompt", prompt, "--max-new-tokens", "5")
    assert (found.code, found.out) == (0, "5071.\n")


def test_a_preset_without_trained_weights_is_noise_and_must_be_asked_for(run: Shell) -> None:
    refused = run("generate", "--model", "small", "--prompt", "x")
    assert refused.code == 2
    assert "model 'small' has no trained weights; allowed are tiny and" in refused.err
    refused = run("generate", "--model", "tiny", "--variant", "swa", "--prompt", "x")
    assert refused.code == 2
    assert "model 'tiny' as swa has no trained weights" in refused.err
    arguments = ["generate", "--model", "tiny", "--random-weights", "--prompt", "x", "--max-new-tokens", "5"]
    noise = [run(*arguments, "--variant", "swa").out for _ in range(2)]
    assert noise[0] == noise[1] != ""


def test_a_long_prompt_shows_how_far_it_is_on_a_terminal_only(
    run: Shell, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long").write_bytes(b"abcdefgh" * 2500)
    words = ["generate", "--model", str(directory), "--prompt-file", str(tmp_path / "long"), "--max-new-tokens", "0"]
    piped = run(*words)
    assert (piped.code, piped.err) == (0, "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    shown = run(*words)
    assert shown.code == 0
    assert re.search(r"read: +[1-9]\d*%.* \d+\.\dk/20\.0k ", shown.err)  # the last tenth of a second may be left out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --prompt and --prompt-file"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--memory", "disk"], "--memory disk needs --memory-dir"),
        (["--prompt", "x", "--device", "tpu"], "device 'tpu'"),
        (["--prompt", "x", "--stop", ""], "empty string"),
        (["--prompt", "x", "--temperature", "1", "--top-p", "0"], "0"),
        (["--prompt", "x", "--random-weights"], "--random-weights is for presets"),
        (["--prompt", "x", "--memory", "host", "--memory-dir", "d"], "--memory-dir is for --memory disk, not host"),
        (["--prompt-file", "/nowhere/file"], "/nowhere/file"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str, run: Shell, directory: Path) -> None:
    refused = run("generate", "--model", str(directory), *arguments)
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    assert message in refused.err


@pytest.mark.parametrize("command", [("generate", "--prompt", "a"), ("eval", "--task", "s-niah", "--lengths", "1k")])
def test_weights_that_are_not_finite_are_named(
    command: tuple[str, ...], run: Shell, directory: Path, tmp_path: Path
) -> None:
    model = from_pretrained(directory)
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    save_pretrained(model, tmp_path)
    shown = run(*command, "--model", str(tmp_path))
    assert (shown.code, shown.out) == (1, "")
    assert f"error: {tmp_path}: norm.weight holds" in shown.err


def test_a_memory_of_another_model_is_refused(run: Shell, directory: Path, tmp_path: Path) -> None:
    preset_model = ["generate", "--model", "tiny", "--random-weights", "--prompt", "abc", "--max-new-tokens", "0"]
    assert run(*preset_model, "--save-memory", str(tmp_path / "kept")).code == 0
    refused = run("generate", "--model", str(directory), "--load-memory", str(tmp_path / "kept"), "--prompt", "x")
    assert refused.code == 1
    assert "was read by another model" in refused.err
