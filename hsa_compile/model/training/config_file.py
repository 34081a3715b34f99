"""How a run's config is read: a preset's recipe, a TOML file and dotted overrides; and its copy beside the run."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from hsa_compile.checks import check_choice, shown
from hsa_compile.errors import InvalidArgument
from hsa_compile.files import parse_json, read_regular
from hsa_compile.model.config import VARIANTS, ModelConfig
from hsa_compile.model.presets import PRESETS, preset
from hsa_compile.model.training.config import DataConfig, RunConfig, Stage, TrainConfig
from hsa_compile.paths import RECIPE_DIR

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SECTIONS = ("model", "train", "data", "stages")
_PRESET, _VARIANT = "preset", "variant"
_DEFAULT_PRESET = "tiny"
_DEFAULT_RECIPE = "default"
_SECTION = TypeVar("_SECTION", TrainConfig, DataConfig, Stage)


def resolve(
    *, preset_name: str | None = None, file: Path | None = None, overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> RunConfig:  # fmt: skip
    """Makes the config of a run: the preset's recipe, then the file, then the settings, then the overrides.

    A file's list of stages replaces the recipe's.

    Args:
        preset_name: one of `PRESETS`; None takes what the file says, or `tiny`.
        file: a TOML file, or the JSON that a run left.
        overrides: `section.field=value`, such as `train.lr=3e-4`, `model.top_k=4`, `stages.0.window=16`.
        settings: dotted names with values, from flags.

    Raises:
        InvalidArgument: a file, section, field or value is not allowed.
    """
    given: dict[str, Any] = _read(file) if file is not None else {}
    _check_names("config", given, SECTIONS)
    name = preset_name or _section(given, "model").get(_PRESET)
    complete = name is None and "vocab_size" in _section(given, "model")
    merged: dict[str, Any] = {"model": {}, "train": {}, "data": {}, "stages": []}
    if not complete:
        merged = _recipe(name or _DEFAULT_PRESET)
    for section in SECTIONS[:-1]:
        merged[section] = {**_section(merged, section), **_section(given, section)}
    merged["stages"] = _stages(given.get("stages", merged["stages"]))
    if not complete:
        merged["model"][_PRESET] = name or _DEFAULT_PRESET
    for dotted, value in (settings or {}).items():
        _set(merged, dotted, value)
    for override in overrides:
        dotted, sign, text = override.partition("=")
        if not sign:
            raise InvalidArgument(f"override {override!r} must be section.field=value, such as train.lr=3e-4")
        _set(merged, dotted.strip(), _value(text.strip()))
    return from_dict(merged)


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Makes the config that plain values describe, as in a TOML file or in `RunConfig.to_dict`.

    Raises:
        InvalidArgument: a section, field or value is not allowed.
    """
    _check_names("config", values, SECTIONS)
    stages = _stages(values.get("stages", []))
    return RunConfig(
        model=_model(_section(values, "model")),
        train=_build(TrainConfig, "train", _section(values, "train")),
        data=_build(DataConfig, "data", _section(values, "data")),
        stages=tuple(_build(Stage, f"stages.{number}", stage) for number, stage in enumerate(stages)),
    )


def _model(values: dict[str, Any]) -> ModelConfig:
    base: dict[str, Any] = {}
    values = dict(values)
    if (name := values.pop(_PRESET, None)) is not None:
        check_choice("preset", name, PRESETS)
        base = preset(name, str(values.get(_VARIANT, VARIANTS[0]))).to_dict()
    _check_names("model", values, [spec.name for spec in fields(ModelConfig)] + [_PRESET])
    return ModelConfig.from_dict({**base, **values})


def _recipe(name: str) -> dict[str, Any]:
    check_choice("preset", name, PRESETS)
    own = RECIPE_DIR / f"{name}.toml"
    return _read(own if own.exists() else RECIPE_DIR / f"{_DEFAULT_RECIPE}.toml")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_regular(path).decode()
        values = parse_json(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise InvalidArgument(f"config {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # the text is no TOML, JSON or UTF-8, or nested too deep
        raise InvalidArgument(f"config {path} is no {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error
    if not isinstance(values, dict):
        raise InvalidArgument(f"config {path} holds a {type(values).__name__}; sections are needed")
    return values


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name, {})
    if not isinstance(section, Mapping):
        raise InvalidArgument(f"{name} = {shown(section)} must be a section: [{name}]")
    return dict(section)


def _stages(stages: Any) -> list[dict[str, Any]]:
    if not isinstance(stages, list | tuple) or not all(isinstance(stage, Mapping) for stage in stages):
        raise InvalidArgument(f"stages = {shown(stages)} must be a list of tables: [[stages]]")
    return [dict(stage) for stage in stages]


def _build(cls: type[_SECTION], where: str, values: Mapping[str, Any]) -> _SECTION:
    _check_names(where, values, [spec.name for spec in fields(cls)])
    missing = [
        spec.name
        for spec in fields(cls)
        if spec.name not in values and spec.default is MISSING and spec.default_factory is MISSING
    ]
    if missing:
        raise InvalidArgument(f"{where} needs {', '.join(missing)}")
    try:
        return cls(**values)
    except InvalidArgument as error:
        raise InvalidArgument(str(error).replace("stages.", f"{where}.", 1)) from error


def _check_names(where: str, values: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for name in values:
        if name not in allowed:
            raise InvalidArgument(f"{where} has no field {shown(name)}; allowed are {', '.join(allowed)}")


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Puts a value in its place; whether the field exists is checked when the config is built."""
    section, _, rest = dotted.partition(".")
    if section not in SECTIONS or not rest:
        raise InvalidArgument(f"{dotted!r} is no field; allowed are {', '.join(f'{name}.…' for name in SECTIONS)}")
    if section != "stages":
        values[section][rest] = value
        return
    number, _, rest = rest.partition(".")
    stages = values["stages"]
    if not number.isdecimal() or not rest or int(number) >= len(stages):
        raise InvalidArgument(f"{dotted!r} is no field of a stage; allowed are stages.0.… to {len(stages) - 1}.…")
    stages[int(number)][rest] = value


def _value(text: str) -> Any:
    """Reads a value as TOML has it; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
