"""`PRESET|DIR`: how commands name a model."""

from pathlib import Path

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import VARIANTS, ModelConfig
from hsa_compile.model.presets import PRESETS, preset
from hsa_compile.model.pretrained import read_config


def config_of(model: str, variant: str | None) -> ModelConfig:
    """The config of a preset or of a saved model.

    Args:
        model: name of a preset, or a directory.
        variant: of the preset; None for `hsa-ultralong`.

    Raises:
        InvalidArgument: neither a preset nor a directory, or a variant of a saved model.
    """
    if model in PRESETS:
        return preset(model, variant or VARIANTS[0])
    if not Path(model).is_dir():
        raise InvalidArgument(f"model {model!r} is neither a directory nor one of the presets {', '.join(PRESETS)}")
    if variant is not None:
        raise InvalidArgument(f"--variant {variant} is for presets; {model} is a saved model with a variant of its own")
    return read_config(Path(model))
