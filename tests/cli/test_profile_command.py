"""`profile` as a person meets it."""

import json
import re
from pathlib import Path

import pytest
from shell import Shell

from hsa_compile.model.config import VARIANTS
from hsa_compile.model.presets import preset
from hsa_compile.model.pretrained import save_pretrained
from hsa_compile.model.transformer import HSATransformer

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
STEP = ["--seq-len", "256", "--device", "cpu"]


def shares(out: str) -> dict[str, float]:
    """The column of the table, by the op."""
    rows = out.split("\n\n")[1].splitlines()[2:]
    return {row.rsplit(maxsplit=3)[0].strip(): float(row.split()[-2].rstrip("%")) for row in rows}


def test_the_table_sums_to_the_whole_and_names_the_tuned_kernels(run: Shell) -> None:
    shown = run("profile", *STEP, "--top", "6")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith("model tiny, variant hsa-ultralong, step train, batch 1, seq_len 256, dtype float32")
    found = shares(shown.out)
    assert len(found) == 7
    assert list(found)[-1].endswith(" more")
    assert sum(found.values()) == pytest.approx(100, abs=0.5)  # each is rounded
    assert "tuned kernels" in shown.out.splitlines()[-1]


def test_json_holds_every_op(run: Shell) -> None:
    found = run("profile", *STEP, "--step", "prefill", "--json").json
    assert (found["step"], found["seq_len"]) == ("prefill", 256)
    assert sum(op["share"] for op in found["ops"]) == pytest.approx(1)
    assert found["tuned_share"] == pytest.approx(sum(op["share"] for op in found["ops"] if op["ours"]))
    assert found["tuned_share"] > 0


def test_a_saved_model_and_a_trace(run: Shell, tmp_path: Path) -> None:
    save_pretrained(HSATransformer(preset("tiny", "drt")), tmp_path / "model")
    trace = tmp_path / "step.json"
    shown = run("profile", "--model", str(tmp_path / "model"), *STEP, "--step", "decode", "--trace", str(trace))
    assert (shown.code, shown.err) == (0, "")
    assert "variant drt" in shown.out
    assert shown.out.endswith(f"trace in {trace}\n")
    assert json.loads(trace.read_text())["traceEvents"]


def test_recorded_picks_can_be_tuned_on(run: Shell, tmp_path: Path) -> None:
    picks = tmp_path / "picks.safetensors"
    shown = run("profile", "--record-picks", str(picks), *STEP)
    assert (shown.code, shown.out) == (0, f"picks of 1 retrieval on 1 x 256 tokens in {picks}\n")
    shape = [
        "--seq-len",
        "300",
        "--heads",
        "2",
        "--kv-heads",
        "1",
        "--head-dim",
        "16",
        "--chunk-size",
        "32",
        "--top-k",
        "3",
    ]
    flags = ["--op", "forward", *shape, "--trials", "5", "--device", "cpu", "--in-process", "--json"]
    (record,) = run("tune", *flags, "--inputs", str(picks)).json
    assert re.fullmatch(r"picks.safetensors \([0-9a-f]{12}\)", record["inputs"])
    refused = run("tune", "--inputs", str(picks), *flags, "--chunk-size", "64")
    assert refused.code == 2
    assert "have chunk_size 32; the problem has 64" in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "huge"], "'huge' is neither a directory nor one of the presets"),
        (["--seq-len", "1k,2k"], "2 lengths"),
        (["--seq-len", "1"], "at least 2 tokens"),
        (["--step", "sleep"], "'train', 'prefill', 'decode'"),
        (["--variant", "rnn"], VARIANTS[0]),
        (["--device", "banana"], "auto, cpu, cuda"),
        (["--record-picks", "picks.npz"], "must end in .safetensors"),
        (["--record-picks", "p.safetensors", "--seq-len", "32"], "texts longer than a chunk, 32"),
        (["--record-picks", "p.safetensors", "--variant", "drt"], "has no trained weights"),
        (["--record-picks", "p.safetensors", "--trace", "step.json"], "allowed is one at a time"),
        (["--trace", "step.txt", "--seq-len", "64"], "must end in .json or .json.gz"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(arguments: list[str], message: str, run: Shell) -> None:
    refused = run("profile", *arguments)
    assert refused.code == 2
    assert refused.out == ""
    assert message in refused.err
    assert len(refused.err.splitlines()) == 1
