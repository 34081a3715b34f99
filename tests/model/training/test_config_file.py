"""Recipes, files and overrides become one config, and a wrong value one line."""

from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import SECTIONS, small_run, write_toml

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.presets import PRESETS
from hsa_compile.model.pretrained import read_config, read_extra
from hsa_compile.model.training.config_file import from_dict, resolve
from hsa_compile.paths import CHECKPOINT_DIR


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_recipe_that_is_allowed(name: str) -> None:
    assert resolve(preset_name=name).model == PRESETS[name]


def test_without_anything_it_is_tiny() -> None:
    assert resolve() == resolve(preset_name="tiny")


def test_a_config_survives_as_json_and_as_toml(tmp_path: Path) -> None:
    run = small_run()
    assert from_dict(run.to_dict()) == run
    assert resolve(file=write_toml(tmp_path / "run.toml", run)) == run


def test_a_file_adds_to_the_recipe_and_overrides_beat_both(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[model]\npreset = 'small'\ntop_k = 4\n[train]\nlr = 0.1\nclip = 2.0\n")
    run = resolve(file=file, overrides=["train.lr=3e-4", "stages.0.window=16", "model.variant=swa"])
    assert (run.train.lr, run.train.clip, run.model.top_k, run.model.variant) == (3e-4, 2.0, 4, "swa")
    assert run.model.dim == PRESETS["small"].dim
    assert run.stages[0].window == 16
    assert run.train.beta2 == 0.95


def test_a_files_stages_replace_those_of_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[data]\ncorpus = ''\n[[stages]]\nseq_len = 128\nbatch_tokens = 512\n")
    assert [stage.seq_len for stage in resolve(file=file).stages] == [128]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=-1", "train.lr = -1 must be a number in 0 … 1000"),
        ("train.lr=fast", "train.lr = 'fast' must be a number"),
        ("train.lr=nan", "train.lr = nan must be a number"),
        ("train.steps=0", "train.steps = 0 must be an integer in 1 …"),
        ("train.steps=1.5", "train.steps = 1.5 must be an integer"),
        ("train.decay=exponential", "train.decay = 'exponential' is not one of constant, linear, cosine"),
        ("train.speed=1", "train has no field 'speed'; allowed are steps, seed"),
        ("model.pooled_landmarks=3", "pooled_landmarks = 3 is not one of 0, 1, 2, 4, 8, 16"),
        ("model.chunk_size=20", "pooled_landmarks = 8 must divide chunk_size = 20"),
        ("model.top_k=0", "top_k = 0 must be an integer in 1 … 128"),
        ("model.depth=3", "model has no field 'depth'"),
        ("stages.0.seq_len=1", "stages.0.seq_len = 1 must be an integer in 2 …"),
        ("stages.0.frozen=['memory']", "stages.0.frozen = 'memory' is not one of embedding, convolution, lower"),
        ("stages.0.frozen=norm", "stages.0.frozen = 'norm' must be a list of embedding, convolution, lower"),
        ("stages.0.min_seq_len=5000", "stages.0.min_seq_len = 5000 must be at most seq_len"),
        ("stages.0.num_needles=[5, 2]", "stages.0.num_needles = [5, 2] must have the smaller number first"),
        ("stages.0.tasks={niah = 1}", "task = 'niah' is not one of s-niah, "),
        ("stages.0.tasks=3", "tasks = 3 must be a table such as {s-niah = 1.0}"),
        ("stages.0.haystacks={web = 1}", "haystack = 'web' is not one of noise, needles, corpus, assignments"),
        ("stages.9.window=4", "'stages.9.window' is no field of a stage; allowed are stages.0.… to 4.…"),
        ("stages.0.top_k=500", "top_k = 500 must be an integer in 1 … 128"),
        ("lr=1", "'lr' is no field; allowed are model.…, train.…, data.…, stages.…"),
        ("train.lr", "must be section.field=value"),
        ("data.corpus=", "takes text of a corpus and data.corpus is empty"),
        ("data.corpus=3", "data.corpus = 3 must be 'stdlib' or a folder"),
    ],
)
def test_a_wrong_override_is_named_with_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        resolve(preset_name="tiny", overrides=[override])
    assert message in str(error.value)


def test_a_corpus_that_no_stage_reads_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="is used by no stage"):
        from_dict({**SECTIONS, "data": {"corpus": "stdlib"}})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", b"[train\n", "is no TOML"),
        ("a.json", b"{", "is no JSON"),
        ("a.json", b"[]", "holds a list"),
        ("a.toml", b"\xff", "is no TOML"),
        ("a.toml", b"[optimizer]\nlr = 1\n", "config has no field 'optimizer'; allowed are model, train, data, stages"),
        ("a.toml", b"train = 3\n", r"train = 3 must be a section: \[train\]"),
        ("a.toml", b"stages = 3\n", "stages = 3 must be a list of tables"),
        ("a.toml", b"[[stages]]\nseq_len = 4\n", "stages.0 needs batch_tokens"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgument, match=message):
        resolve(file=tmp_path / name)


@pytest.mark.parametrize("stages", ["3", "[1]"])
def test_stages_that_are_none_are_named_before_an_override_changes_one(tmp_path: Path, stages: str) -> None:
    (tmp_path / "a.toml").write_text(f"stages = {stages}\n")
    with pytest.raises(InvalidArgument, match=r"stages = .* must be a list of tables"):
        resolve(file=tmp_path / "a.toml", overrides=["stages.0.window=16"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"none\.toml cannot be read: No such file"):
        resolve(file=tmp_path / "none.toml")


def test_the_shipped_model_is_what_the_recipe_makes() -> None:
    shipped = CHECKPOINT_DIR / "tiny"
    training = read_extra(shipped)["training"]
    recipe, run = resolve(preset_name="tiny"), from_dict(training["config"])
    assert training["precision"] == "float32"  # what the recipe's `auto` is on CPUs without units for bfloat16
    free = {name: getattr(recipe.train, name) for name in ("precision", "save_every", "keep_last", "probe_every")}
    assert replace(run, train=replace(run.train, **free)) == recipe
    last = recipe.model_in(recipe.stages[-1])
    assert read_config(shipped) == replace(last, retrieval_scale=recipe.train.sharpen_scores)
