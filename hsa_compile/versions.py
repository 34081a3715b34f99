"""Versions of what a measurement depends on."""

import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

from hsa_compile.errors import MissingDependency

PACKAGES = ("hsa-compile", "torch", "triton", "optuna")
_DRIVERS = (Path("/sys/module/nvidia/version"), Path("/sys/module/amdgpu/version"))


def installed_versions() -> dict[str, str]:
    """Package → version, `not installed` where it is missing; and `driver`, of the GPU, where there is one."""
    versions = {name: _version(name) for name in PACKAGES}
    if driver := next((path.read_text().strip() for path in _DRIVERS if path.exists()), None):
        versions["driver"] = driver
    return versions


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


# What is imported → the extra of pyproject.toml that installs it.
EXTRAS = {
    "transformers": "hf",
    "lm_eval": "harness",
    "tokenizers": "train",
    "datasets": "train",
    "pyarrow": "train",
    "zstandard": "train",
    "tensorboard": "train",
    "wandb": "wandb",
    "plotly": "plots",
    "matplotlib": "plots",
    "sklearn": "plots",
}


def require(module: str, feature: str) -> Any:
    """The module, imported now.

    Args:
        module: perhaps with a dot in its name; the first part is one of `EXTRAS`.
        feature: what needs it, as a sentence begins.

    Raises:
        MissingDependency: it is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(module, feature) from error


def missing(module: str, feature: str) -> MissingDependency:
    """The error that says what to install; arguments as of `require`."""
    package = module.partition(".")[0]
    return MissingDependency(f"{feature} needs {package}: {install_command(package)}")


def install_command(package: str) -> str:
    """What a person types to get a package of `EXTRAS`."""
    return f"pip install 'hsa-compile[{EXTRAS[package]}]'"
