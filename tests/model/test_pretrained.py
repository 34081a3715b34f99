"""A saved model comes back bit for bit; a kill leaves the old one; what is not a model is refused by name."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_models import build, small_config

from hsa_compile.errors import InvalidArgument, SaveError
from hsa_compile.model.pretrained import from_pretrained, read_config, read_extra, read_tokenizer, save_pretrained
from hsa_compile.model.tensor_files import read_metadata, read_tensors, write_tensors

TOKENS = torch.arange(2 * 33).view(2, 33) % 19


@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
def test_a_model_comes_back_as_it_was(variant: str, tmp_path: Path) -> None:
    model = build(small_config(variant))
    save_pretrained(model, tmp_path / "deep" / "er", tokenizer="bytes", extra={"step": 7})
    again = from_pretrained(tmp_path / "deep" / "er")
    assert again.config == model.config
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in again.parameters())
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])
    assert read_extra(tmp_path / "deep" / "er") == {"step": 7}
    assert read_tokenizer(tmp_path / "deep" / "er") == "bytes"


def test_others_may_read_a_model_as_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_pretrained(build(small_config("swa")), tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes["model.safetensors"] == 0o640
    assert set(modes.values()) == {0o640}


def test_the_balancing_bias_is_saved_and_stays_float32(tmp_path: Path) -> None:
    model = build(small_config("hsa-ultralong"))
    name = next(name for name, _ in model.named_buffers() if name.endswith("balance_bias"))
    model.get_buffer(name).copy_(torch.arange(4.0) / 3)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(again.get_buffer(name), torch.arange(4.0) / 3)


def test_untied_embeddings_are_two_tensors_and_tied_ones_one(tmp_path: Path) -> None:
    for tied in (True, False):
        model = build(small_config("swa", tie_embeddings=tied))
        save_pretrained(model, tmp_path / str(tied))
        size = (tmp_path / str(tied) / "model.safetensors").stat().st_size
        assert abs(size - 4 * sum(p.numel() for p in model.parameters())) < 20_000
        again = from_pretrained(tmp_path / str(tied))
        assert (again.output is None) == tied


@pytest.mark.parametrize("left", [0, 4, 5000, -1])
def test_a_truncated_file_of_weights_is_refused_by_name(left: int, tmp_path: Path) -> None:
    save_pretrained(build(small_config("swa")), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(SaveError, match=r"model\.safetensors.*truncated"):
        from_pretrained(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    model = build(small_config("swa"))
    save_pretrained(model, tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(SaveError, match=r"model\.safetensors.*no safetensors file"):
        from_pretrained(tmp_path)


def edited(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_foreign_and_mismatching_files_are_refused_by_name(tmp_path: Path) -> None:
    model, config = build(small_config("swa")), tmp_path / "config.json"
    save_pretrained(model, tmp_path)
    whole = config.read_text()
    for change, message in (
        ({"model_type": "llama"}, "another program.*'llama'"),
        ({"format_version": 2}, "format_version = 2; this hsa-compile reads 1"),
        ({"hsa_config": {**model.config.to_dict(), "dim": 32}}, r"model\.safetensors.*has shape \[\d+, 24\].*, 32\]"),
        ({"hsa_config": {**model.config.to_dict(), "variant": "drt"}}, r"model\.safetensors.*lacks .* and \d+ more"),
        ({"save_id": "other"}, r"config\.json and .*model\.safetensors are of different saves"),
    ):
        edited(tmp_path, **change)
        with pytest.raises(SaveError, match=message):
            from_pretrained(tmp_path)
        config.write_text(whole)
    edited(tmp_path, hsa_config={**model.config.to_dict(), "dim": -1})
    with pytest.raises(InvalidArgument, match=r"config\.json: dim = -1"):
        from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(SaveError, match=r"config\.json is damaged"):
        from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(SaveError, match=r"config\.json cannot be read"):
        from_pretrained(tmp_path)
    with pytest.raises(SaveError, match="nowhere is not a directory"):
        from_pretrained(tmp_path / "nowhere")


def test_sizes_that_no_weight_depends_on_may_be_edited(tmp_path: Path) -> None:
    model = build(small_config("swa"))
    save_pretrained(model, tmp_path)
    edited(tmp_path, hsa_config={**model.config.to_dict(), "window": 3})
    assert from_pretrained(tmp_path).config.window == 3


def test_a_kill_between_the_two_files_keeps_the_new_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(build(small_config("swa")), tmp_path)
    rename = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.name == "config.json":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(build(small_config("drt")), tmp_path)
    assert from_pretrained(tmp_path).config.variant == "drt"
    save_pretrained(build(small_config("full")), tmp_path)
    assert from_pretrained(tmp_path).config.variant == "full"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "modeling_hsa_compile.py",
    ]


SAVER = """
import sys, torch
from hsa_compile.model.presets import preset
from hsa_compile.model.pretrained import save_pretrained
from hsa_compile.model.transformer import HSATransformer
models = [HSATransformer(preset("tiny", variant)) for variant in ("swa", "hsa-ultralong")]
for model in models:
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
print("ready", flush=True)
for step in range(1_000_000):
    save_pretrained(models[step % 2], sys.argv[1], extra={"variant": models[step % 2].config.variant})
"""


@pytest.mark.exhaustive
def test_a_kill_at_any_moment_leaves_a_whole_model(tmp_path: Path) -> None:
    save_pretrained(build(small_config("swa")), tmp_path)
    for attempt in range(3):
        with subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE) as saver:
            assert saver.stdout is not None
            assert saver.stdout.readline() == b"ready\n"
            time.sleep(0.05 + 0.0717 * attempt)
            saver.send_signal(signal.SIGKILL)
        model = from_pretrained(tmp_path)
        assert read_extra(tmp_path).get("variant", "swa") == model.config.variant


def test_a_full_disk_leaves_the_old_model(tmp_path: Path) -> None:
    old = build(small_config("swa"))
    save_pretrained(old, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        with pytest.raises(SaveError, match=r"model\.safetensors cannot be written"):
            save_pretrained(build(small_config("full")), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    again = from_pretrained(tmp_path)
    assert again.config == old.config
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "modeling_hsa_compile.py",
    ]


def test_an_integer_dtype_is_refused(tmp_path: Path) -> None:
    save_pretrained(build(small_config("swa")), tmp_path)
    with pytest.raises(InvalidArgument, match=r"torch\.int8 is not allowed"):
        from_pretrained(tmp_path, dtype=torch.int8)


def test_the_config_is_read_without_the_weights_being_built(tmp_path: Path) -> None:
    model = build(small_config("ramba"))
    save_pretrained(model, tmp_path)
    assert read_config(tmp_path) == model.config


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    model = build(small_config("swa"))
    with torch.no_grad():
        model.norm.weight[3] = value
    save_pretrained(model, tmp_path)
    with pytest.raises(SaveError, match=r"norm\.weight holds values that are infinite or not a number"):
        from_pretrained(tmp_path, dtype=torch.float16)  # 1e5 is beyond what it holds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hsa_config": 7}, "hsa_config = 7 must be an object"),
        ({"extra": [1]}, r"extra = \[1\] must be an object"),
        ({"tokenizer": None}, "tokenizer = None must be a text"),
        ({"tokenizer": "../../etc/passwd"}, "must be bytes or the name of a file beside it"),
        ({"tokenizer": "a\nb"}, "printable"),
        ({"save_id": 3}, "save_id = 3 must be a text"),
        ({"format_version": [[]]}, r"format_version = \[\[\]\]"),
    ],
)
def test_a_field_of_another_type_is_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    save_pretrained(build(small_config("swa")), tmp_path)
    edited(tmp_path, **change)
    with pytest.raises(SaveError, match=rf"config\.json.*{message}"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expert_dim", 12.5), ("experts_per_token", "2"), ("dim", 2**21), ("num_groups", 900), ("rope_theta", "1"),
        ("norm_eps", float("nan")), ("init_std", float("inf")), ("tie_embeddings", 1), ("variant", ["swa"]),
        ("num_experts", 10**400),
    ],
)  # fmt: skip
def test_a_size_of_another_type_or_beyond_all_bounds_is_named(field: str, value: object, tmp_path: Path) -> None:
    model = build(small_config("hsa-ultralong"))
    save_pretrained(model, tmp_path)
    edited(tmp_path, hsa_config={**model.config.to_dict(), field: value})
    with pytest.raises(InvalidArgument, match=rf"config\.json: .*{field}|900 groups"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    save_pretrained(build(small_config("swa")), tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(SaveError, match=rf"{name} cannot be read: it is no regular file"):
        from_pretrained(tmp_path)


def test_weights_of_another_dtype_and_a_lacking_embedding_are_refused(tmp_path: Path) -> None:
    save_pretrained(build(small_config("swa")), tmp_path)
    path = tmp_path / "model.safetensors"
    saved, metadata = read_tensors(path), read_metadata(path)
    write_tensors(path, {**saved, "norm.weight": saved["norm.weight"].int()}, metadata)
    with pytest.raises(SaveError, match=r"norm\.weight has dtype torch\.int32; a float dtype is needed"):
        from_pretrained(tmp_path)
    del saved["embedding.weight"]
    write_tensors(path, saved, metadata)
    with pytest.raises(SaveError, match=r"it lacks embedding\.weight"):
        from_pretrained(tmp_path)
