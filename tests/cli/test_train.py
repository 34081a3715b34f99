"""`hsa-compile train` as a person meets it."""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shell import Shell

from hsa_compile.cli.models import train as train_module
from hsa_compile.model.training import metrics
from hsa_compile.model.training import run as run_module
from hsa_compile.schedules.record import TuningRecord

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

SMALL = """
[model]
preset = "tiny"
dim = 16
num_heads = 2
num_kv_heads = 1
head_dim = 4
memory_heads = 2
memory_head_dim = 8
retrieval_dim = 8
ffn_dim = 16
encoder_ffn_dim = 16
num_experts = 0

[train]
steps = 4
precision = "float32"
save_every = 2
probe_every = 4
probe_samples = 1
log_every = 2

[data]
corpus = ""

[[stages]]
seq_len = 64
batch_tokens = 128
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(metrics, "_tensorboard", lambda directory: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


def test_it_trains_and_says_where_the_model_is(run: Shell, config: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run("train", "--config", config, "--out", str(out), "train.lr=3e-4", "--seed", "7")
    assert done.code == 0, done.err
    assert done.out.startswith("computing in float32\n")
    assert "step 4/4  loss " in done.out
    assert "step 4: held_out_loss " in done.out
    assert f"model in {out}/model, after 4 steps" in done.out
    assert "no TensorBoard files: pip install 'hsa-compile[train]'" in done.err
    saved = json.loads((out / "config.json").read_text())
    assert (saved["train"]["lr"], saved["train"]["seed"], saved["model"]["dim"]) == (3e-4, 7, 16)
    assert run("generate", "--model", str(out / "model"), "--prompt", "a", "--max-new-tokens", "1").code == 0


def test_it_stops_after_some_minutes_and_goes_on(run: Shell, config: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped = run("train", "--config", config, "--out", str(out), "--minutes", "1e-9")
    assert stopped.code == 0
    assert f"stopped and saved after step 1 of 4; to go on: hsa-compile train --out {out} --resume" in stopped.out
    done = run("train", "--out", str(out), "--resume")
    assert done.code == 0
    assert "after 4 steps" in done.out
    same = run("train", "--config", config, "--out", str(out), "--resume")
    assert same.code == 0


@pytest.fixture
def a_step_takes_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that nothing else moves."""
    now = [0.0]
    real = run_module.run_step

    def slow(*arguments: Any, **options: Any) -> Any:
        now[0] += 10.0
        return real(*arguments, **options)

    monkeypatch.setattr(run_module, "run_step", slow)
    monkeypatch.setattr(train_module, "time", SimpleNamespace(monotonic=lambda: now[0]))


@pytest.mark.usefixtures("a_step_takes_ten_seconds")
@pytest.mark.parametrize(("minutes", "made"), [("2.1", 13), ("2.05", 12)])
def test_it_stops_at_the_step_that_ends_nearest_to_the_time(
    minutes: str, made: int, run: Shell, config: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "run")
    stopped = run(
        "train", "--config", config, "--out", out, "--steps", "30", "--minutes", minutes, "train.save_every=0"
    )
    assert f"stopped and saved after step {made} of 30" in stopped.out
    assert f"{minutes} minutes are enough for about {made} of 30 steps at the rate of the first 10" in stopped.out


@pytest.mark.usefixtures("a_step_takes_ten_seconds")
def test_it_says_how_long_the_run_will_take(run: Shell, config: str, tmp_path: Path) -> None:
    done = run("train", "--config", config, "--out", str(tmp_path / "run"), "--steps", "23", "train.save_every=0")
    assert "the 13 steps that are left will take about 2.2 minutes at the rate of the first 10" in done.out
    assert ", 90 s left" in done.out


def test_signals_are_as_before_once_it_is_done(run: Shell, config: str, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run("train", "--config", config, "--out", str(tmp_path / "run"), "--steps", "1").code == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_folder_with_a_run_needs_resume_and_the_same_settings(run: Shell, config: str, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    assert run("train", "--config", config, "--out", out, "--steps", "1").code == 0
    anew = run("train", "--config", config, "--out", out)
    assert (anew.code, anew.err.count("error:")) == (2, 1)
    assert "holds a run; --resume goes on with it" in anew.err
    other = run("train", "--config", config, "--out", out, "--resume", "--steps", "1", "train.lr=0.5")
    assert other.code == 2
    assert "was begun with train.lr = 0.002, not 0.5" in other.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "'huge' is not one of 'tiny', 'small'"),
        (["train.lr=0"], "train.lr = 0 must be more than 0"),
        (["model.top_k=999"], "top_k = 999 must be an integer in 1 … 128"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--minutes", "0"], "0.0 is not in the range x>0"),
        (["--config", "/nowhere.toml"], "config /nowhere.toml cannot be read: No such file"),
        (["stages.0.seq_len=40", "data.corpus="], "stages.0.min_seq_len = 64 must be at most seq_len = 40"),
        (["train.wandb_project=mine", "data.corpus="], "takes text of a corpus and data.corpus is empty"),
    ],
)
def test_a_wrong_value_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, run: Shell, tmp_path: Path
) -> None:
    failed = run("train", "--out", str(tmp_path / "run"), *arguments)
    assert failed.code == 2
    assert failed.err.count("\n") == 1
    assert failed.err.startswith("error: ")
    assert message in failed.err
    assert not (tmp_path / "run").exists()


def test_a_corpus_that_is_not_there_is_named_and_nothing_is_written(run: Shell, tmp_path: Path) -> None:
    failed = run("train", "--out", str(tmp_path / "run"), "--corpus", str(tmp_path / "none"))
    assert failed.code != 0
    assert failed.err.startswith("error: ")
    assert str(tmp_path / "none") in failed.err
    assert not (tmp_path / "run").exists()


def test_a_missing_wandb_is_named(run: Shell, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    failed = run("train", "--config", config, "--out", str(tmp_path / "run"), "train.wandb_project=mine")
    assert failed.code == 2
    assert "pip install 'hsa-compile[wandb]'" in failed.err


def test_without_tune_nothing_is_tuned_and_with_it_what_is_missing(
    run: Shell, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = []

    def tune(problem: object, *_: object, **__: object) -> TuningRecord:
        tuned.append(problem)
        raise KeyboardInterrupt

    monkeypatch.setattr("hsa_compile.autotune.tune.tune", tune)
    assert run("train", "--config", config, "--out", str(tmp_path / "a"), "--steps", "1").code == 0
    assert tuned == []
    stopped = run("train", "--config", config, "--out", str(tmp_path / "b"), "--steps", "1", "--tune")
    assert stopped.code == 130
    assert len(tuned) == 1
    assert "4 problems, 0 tuned before, 4 to tune, at most 15 s each" in stopped.err


NARROW = ["model.dim=16", "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=4", "model.memory_heads=2",
          "model.memory_head_dim=8", "model.retrieval_dim=8", "model.ffn_dim=16", "model.encoder_ffn_dim=16",
          "model.expert_dim=8"]  # fmt: skip


@pytest.mark.parametrize("changes", [NARROW, pytest.param([], marks=pytest.mark.exhaustive)], ids=["narrow", "whole"])
def test_the_recipe_of_small_takes_a_first_step_of_each_stage_at_reduced_lengths(
    changes: list[str], run: Shell, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("".join(f"value_{number} = {number}\n" for number in range(2000)))
    assert run("prepare", str(tmp_path / "text.txt"), "--out", str(tmp_path / "corpus"), "--validation", "0").code == 0
    lengths = [f"stages.{stage}.{name}" for stage, size in enumerate((128, 512, 1024)) for name in
               (f"min_seq_len={size}", f"seq_len={size}", f"batch_tokens={size}", "share=1")]  # fmt: skip
    trained = run("train", "--preset", "small", "--corpus", str(tmp_path / "corpus"), "--out", str(tmp_path / "run"),
                  "train.steps=3", "train.probe_every=0", "train.log_every=1", *lengths, *changes)  # fmt: skip
    assert trained.code == 0, trained.err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(record["stage"], record["seq_len"]) for record in records] == [(0, 128), (1, 512), (2, 1024)]
    assert all(0 < record["loss"] < 100 for record in records)
    model = str(tmp_path / "run" / "model")
    asked = run("eval", "--model", model, "--task", "vt", "--lengths", "200", "--samples", "1",
                "--depths", "0.5", "--out", str(tmp_path / "evaluation"))  # fmt: skip
    assert asked.code == 0, asked.err


def test_resuming_alone_where_there_is_no_run_is_refused(run: Shell, tmp_path: Path) -> None:
    refused = run("train", "--out", str(tmp_path / "run"), "--resume")
    assert refused.code == 2
    assert f"{tmp_path / 'run'} holds no run to resume" in refused.err
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_its_corpus_in_another_place(
    run: Shell, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "other"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n" * 500)
        assert run("prepare", f"{name}.txt", "--out", name, "--validation", "0").code == 0
    begin = ["train", "--config", config, "--out", "run", "--corpus", "one", "--steps", "2",
             "train.probe_every=0", "stages.0.synthetic_share=0.5"]  # fmt: skip
    assert run(*begin).code == 0
    (tmp_path / "one").rename(tmp_path / "moved")
    go_on = ["train", "--out", "run", "--resume", "--seed", "0"]  # the run's own seed, as a flag
    assert "one holds no finished corpus" in run(*go_on).err
    refused = run(*go_on, "--corpus", "other")
    assert refused.code == 1
    assert "has other text than when run began" in refused.err
    monkeypatch.chdir(tmp_path / "moved")
    assert run("train", "--out", "../run", "--resume", "--corpus", ".").code == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["corpus"] == str(tmp_path / "moved")


def test_resuming_where_there_is_no_run_says_that_one_begins(run: Shell, config: str, tmp_path: Path) -> None:
    begun = run("train", "--config", config, "--out", str(tmp_path / "run"), "--resume", "--steps", "1")
    assert begun.code == 0
    assert f"{tmp_path / 'run'} holds no run; one begins there" in begun.err
