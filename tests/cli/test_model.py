"""`model info` as a person meets it, and the problems of a preset."""

from pathlib import Path

import pytest
from shell import Shell

from hsa_compile.cli.tuning.search_options import preset_problems
from hsa_compile.errors import InvalidArgument
from hsa_compile.model.presets import PRESETS, preset
from hsa_compile.model.pretrained import read_config, save_pretrained
from hsa_compile.model.transformer import HSATransformer
from hsa_compile.paths import CHECKPOINT_DIR
from hsa_compile.problem import Problem
from hsa_compile.target import Target


@pytest.mark.parametrize("name", PRESETS)
def test_info_shows_layers_parameters_memory_and_flops(name: str, run: Shell) -> None:
    shown = run("model", "info", name)
    assert (shown.code, shown.err) == (0, "")
    for word in ("window + MoE" if "0.5b" != name != "345m" else "window + dense", "chunk encoder", "parameters",
                 "memory at 8,192 tokens, bf16", "landmarks", "FLOPs a token, training"):  # fmt: skip
        assert word in shown.out


def test_info_counts_what_was_published(run: Shell) -> None:
    assert "537,720,384" in run("model", "info", "0.5b").out
    assert "519,622,656" in run("model", "info", "0.5b", "--variant", "full").out


def test_info_as_json(run: Shell) -> None:
    shown = run("model", "info", "8b-a1b", "--context", "16m", "--dtype", "bf16", "--json").json
    assert shown["context"] == 2**24
    assert shown["memory"]["chunk_keys"] == 2**24 * 128 * 2
    assert shown["memory"]["total"] == sum(size for part, size in shown["memory"].items() if part != "total")
    assert shown["training_flops"] == pytest.approx(3 * sum(shown["flops"].values()))
    assert len(shown["layers"]) == 20


def test_info_of_a_saved_model(run: Shell, tmp_path: Path) -> None:
    save_pretrained(HSATransformer(preset("tiny", "drt")), tmp_path)
    assert run("model", "info", str(tmp_path)).out == run("model", "info", "tiny", "--variant", "drt").out
    refused = run("model", "info", str(tmp_path), "--variant", "drt")
    assert refused.code == 2
    assert "a variant of its own" in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["huge"], "'huge' is neither a directory nor one of the presets tiny, small, 345m, 0.5b, 8b-a1b"),
        (["tiny", "--context", "0"], "'0' is not a positive integer"),
        (["tiny", "--context", "1k,2k"], "2 numbers"),
        (["tiny", "--variant", "rnn"], "'rnn' is not one of 'hsa-ultralong'"),
        (["tiny", "--dtype", "int8"], "'int8' is not one of 'float32'"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(arguments: list[str], message: str, run: Shell) -> None:
    refused = run("model", "info", *arguments)
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    assert message in refused.err


def test_a_directory_without_a_model_is_named(run: Shell, tmp_path: Path) -> None:
    refused = run("model", "info", str(tmp_path))
    assert refused.code == 1
    assert str(tmp_path / "model.safetensors") in refused.err


# --- the problems of a preset


def test_a_preset_asks_for_training_and_reading_each_once() -> None:
    found = preset_problems("tiny", Target.parse("cpu"), {"batch": [2], "seq_len": [512]})
    assert [problem.op for problem in found] == [
        "hsa_forward", "hsa_backward", "select_chunks", "select_chunks_backward",
        "hsa_forward", "select_chunks", "hsa_decode",
    ]  # fmt: skip
    # The shipped model reads with as many chunks a token as the end of its recipe has, not as many as the preset.
    trained = read_config(CHECKPOINT_DIR / "tiny").top_k
    assert trained != preset("tiny").top_k
    assert [problem.top_k for problem in found] == [preset("tiny").top_k] * 4 + [trained] * 3
    assert len(set(found)) == len(found)
    assert {problem.dtype for problem in found} == {"float32"}
    more = preset_problems("tiny", Target.parse("sm_90"), {"batch": [2], "seq_len": [512, 1024]})
    assert len(more) == 2 * 7
    assert {problem.dtype for problem in more} == {"bfloat16"}


def test_what_a_preset_decides_cannot_be_chosen() -> None:
    with pytest.raises(InvalidArgument, match="decides on --heads"):
        preset_problems("tiny", Target.parse("cpu"), {"num_heads": [4]})
    with pytest.raises(InvalidArgument, match="no kernel of ours"):
        preset_problems("tiny", Target.parse("cpu"), {"seq_len": [8]})


def test_tune_preset_begins_with_the_first_of_those(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Problem] = []

    def tune(problem: Problem, *_: object, **__: object) -> None:
        asked.append(problem)
        raise KeyboardInterrupt

    monkeypatch.setattr("hsa_compile.autotune.tune.tune", tune)
    assert run("tune", "--device", "cpu", "--preset", "tiny", "--seq-len", "512", "--batch", "2").code == 130
    assert asked == preset_problems("tiny", Target.parse("cpu"), {"batch": [2], "seq_len": [512]})[:1]
