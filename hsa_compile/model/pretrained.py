"""A model as a directory: `config.json` and `model.safetensors`, written so that a kill leaves the old ones intact.

A small module beside them leads `transformers` to our classes.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsa_compile.checks import check_text, shown
from hsa_compile.errors import InvalidArgument, SaveError
from hsa_compile.files import make_directory, read_json, replace_file, replace_text, sync_directory, write_json
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.data.tokenizer import BYTES, FileTokenizer, Tokenizer
from hsa_compile.model.tensor_files import read_metadata, read_tensors, write_tensors
from hsa_compile.model.transformer import HSATransformer, empty_model

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
FORMAT_VERSION = 1
_FIELDS = {"save_id": str, "tokenizer": str, "hsa_config": dict, "extra": dict}
_NAMES = {str: "a text", dict: "an object"}
_MOST_ID = 64
# By these `transformers` finds the classes in `model/hf`.
MODEL_TYPE, ARCHITECTURE = "hsa_compile", "HSACompileForCausalLM"
MODULE = "modeling_hsa_compile"
AUTO_MAP = {"AutoConfig": f"{MODULE}.HSACompileConfig", "AutoModelForCausalLM": f"{MODULE}.{ARCHITECTURE}"}
_MODULE_TEXT = f'''"""Leads `transformers`, if it is called with `trust_remote_code=True`, to hsa-compile."""

from hsa_compile.model.hf import HSABytesTokenizer, HSACompileConfig, {ARCHITECTURE}

__all__ = ["HSABytesTokenizer", "HSACompileConfig", "{ARCHITECTURE}"]
'''


def save_pretrained(
    model: HSATransformer,
    directory: str | Path,
    *,
    tokenizer: str | Tokenizer = BYTES,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model so that `from_pretrained`, and `transformers` with our `hf` extra, can read it.

    Other files of the directory stay. A save that is killed leaves the model that was there before.

    Args:
        model: the model, on any device, in any dtype.
        directory: where it is written; it is made if it is not there.
        tokenizer: what turns texts into the model's tokens: a tokenizer, whose file is written beside the model; or
            `bytes`, or the name of a file that somebody else puts there.
        extra: plain values to keep beside the model, such as how it was trained; `read_extra` gives them back.

    Raises:
        SaveError: a file cannot be written.
    """
    directory = Path(directory)
    make_directory(directory)
    save_id = uuid.uuid4().hex
    content = tokenizer.content if isinstance(tokenizer, FileTokenizer) else None
    name = tokenizer if isinstance(tokenizer, str) else BYTES if content is None else TOKENIZER_FILE
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": AUTO_MAP,
        "format_version": FORMAT_VERSION,
        "save_id": save_id,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "tokenizer": name,
        "hsa_config": model.config.to_dict(),
        "extra": dict(extra or {}),
    }
    # Two files cannot be renamed at once. The new config waits under the name of its save until the weights that
    # carry the same name are in place; from there on `_current_config` finds it, even if the last rename never comes.
    replace_text(directory / f"{MODULE}.py", _MODULE_TEXT)
    if content is not None:
        replace_file(directory / TOKENIZER_FILE, lambda temporary: temporary.write_bytes(content))
    waiting = _waiting_config(directory, save_id)
    write_json(waiting, config)
    try:
        write_tensors(directory / WEIGHTS_FILE, model.state_dict(), {"save_id": save_id})
    except SaveError:
        waiting.unlink()
        raise
    waiting.replace(directory / CONFIG_FILE)
    for old in directory.glob(_waiting_config(Path(), "*").name):
        old.unlink(missing_ok=True)
    sync_directory(directory)


def from_pretrained(
    directory: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> HSATransformer:
    """Reads what `save_pretrained` wrote; nothing is unpickled.

    Args:
        directory: the directory of the model.
        device: where the weights are put.
        dtype: the dtype that the weights get; the saved one if None.

    Returns:
        the model, in evaluation mode.

    Raises:
        SaveError: a file is missing, truncated, foreign or does not fit the other, or a weight is not finite in the
            dtype; the message names it.
        InvalidArgument: the config is not allowed, or dtype is no float.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InvalidArgument(f"dtype = {dtype} is not allowed; weights are float32, bfloat16, float16 or float64")
    directory = Path(directory)
    config = read_config(directory)
    model = empty_model(config)
    weights = read_tensors(directory / WEIGHTS_FILE)
    _check_weights(weights, model, directory / WEIGHTS_FILE)
    parameters = dict(model.named_parameters())
    moved = {
        name: tensor.to(device, dtype if name in parameters else None)  # buffers have a dtype of their own
        for name, tensor in weights.items()
    }
    for name, tensor in moved.items():
        if not bool(tensor.isfinite().all()):
            raise SaveError(f"{directory}: {name} holds values that are infinite or not a number")
    model.load_state_dict(moved, assign=True)
    fill_buffers(model, torch.device(device))
    return model.eval()


def fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Sets counters that no file holds to zero, where the meta device left them without values."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device))


def read_config(directory: str | Path) -> ModelConfig:
    """Reads the config of a saved model.

    Raises:
        SaveError: there is no model that this version reads.
        InvalidArgument: the config is not allowed.
    """
    directory = Path(directory)
    try:
        return ModelConfig.from_dict(_current_config(directory)["hsa_config"])
    except InvalidArgument as error:
        raise InvalidArgument(f"{directory / CONFIG_FILE}: {error}") from error


def read_tokenizer(directory: str | Path) -> str:
    """Reads the name of a saved model's tokenizer; errors are those of `read_config`."""
    return str(_current_config(Path(directory))["tokenizer"])


def read_extra(directory: str | Path) -> dict[str, Any]:
    """Reads the `extra` of a saved model; errors are those of `read_config`."""
    return dict(_current_config(Path(directory))["extra"])


def _waiting_config(directory: Path, save_id: str) -> Path:
    return directory / f".{CONFIG_FILE}.{save_id}"


def _current_config(directory: Path) -> dict[str, Any]:
    """Reads the config that belongs to the weights."""
    if not directory.is_dir():
        raise SaveError(f"{directory} is not a directory; a model is one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    weights, path = directory / WEIGHTS_FILE, directory / CONFIG_FILE
    save_id = read_metadata(weights).get("save_id")
    if save_id is None or not save_id.isalnum() or len(save_id) > _MOST_ID:  # it becomes part of a file's name
        raise SaveError(f"{weights} is no model of hsa-compile: its save_id is {shown(save_id)}")
    waiting = _waiting_config(directory, save_id)
    path = waiting if waiting.exists() else path
    config = read_json(path)
    if config.get("model_type") != MODEL_TYPE:
        raise SaveError(
            f"{path} is of another program: model_type = {shown(config.get('model_type'))}, not {MODEL_TYPE!r}"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise SaveError(
            f"{path} has format_version = {config.get('format_version')!r}; this hsa-compile reads {FORMAT_VERSION}"
        )
    for name, kind in _FIELDS.items():
        if name not in config:
            raise SaveError(f"{path} is not complete: {name} is missing")
        if not isinstance(config[name], kind):
            raise SaveError(f"{path}: {name} = {shown(config[name])} must be {_NAMES[kind]}")
    check_text(f"{path}: tokenizer", config["tokenizer"], error=SaveError)
    if Path(config["tokenizer"]).name != config["tokenizer"]:
        raise SaveError(f"{path}: tokenizer = {config['tokenizer']!r} must be bytes or the name of a file beside it")
    if config["save_id"] != save_id:
        raise SaveError(f"{path} and {weights} are of different saves: save_id {config['save_id']!r} and {save_id!r}")
    return config


def _check_weights(weights: Mapping[str, Tensor], model: HSATransformer, path: Path) -> None:
    expected = model.state_dict()
    for what, names in (("lacks", expected.keys() - weights.keys()), ("has besides", weights.keys() - expected.keys())):
        if names:
            shown = sorted(names)[:3]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise SaveError(f"{path} does not fit {CONFIG_FILE}: it {what} {', '.join(shown)}{more}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise SaveError(
                f"{path} does not fit {CONFIG_FILE}: {name} has shape {list(tensor.shape)}; "
                f"{list(expected[name].shape)} is needed"
            )
        if not tensor.is_floating_point():
            raise SaveError(f"{path}: {name} has dtype {tensor.dtype}; a float dtype is needed")
