"""The packages beside this one: the versions that measurements depend on, and the extras that install missing ones."""

import functools
import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

from hsa_compile.errors import MissingDependency

PACKAGES = ("hsa-compile", "torch", "triton", "optuna")
_DRIVERS = (Path("/sys/module/nvidia/version"), Path("/sys/module/amdgpu/version"))

# A module that some feature imports → the extra of pyproject.toml that installs it.
EXTRAS = {
    "transformers": "hf",
    "huggingface_hub": "hf",
    "lm_eval": "harness",
    "tokenizers": "train",
    "datasets": "train",
    "pyarrow": "train",
    "zstandard": "train",
    "tensorboard": "train",
    "wandb": "wandb",
    "matplotlib": "plots",
}


def installed_versions() -> dict[str, str]:
    """Returns package → version, or `not installed`; and the version of the GPU's `driver` where there is a GPU."""
    versions = {name: _version(name) for name in PACKAGES}
    if driver := next((path.read_text().strip() for path in _DRIVERS if path.exists()), None):
        versions["driver"] = driver
    return versions


@functools.cache  # to read what pip wrote takes milliseconds
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def require(module: str, feature: str) -> Any:
    """Imports a module that an extra installs, and returns it.

    Args:
        module: its name, perhaps with dots; the first part is one of `EXTRAS`.
        feature: what needs it, as the first words of the message.

    Raises:
        MissingDependency: the module is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(module, feature) from error


def missing(module: str, feature: str) -> MissingDependency:
    """Returns the error that says what to install; the arguments are those of `require`."""
    package = module.partition(".")[0]
    return MissingDependency(f"{feature} needs {package}: {install_command(package)}")


def install_command(package: str) -> str:
    """Returns the command that installs a package of `EXTRAS`."""
    return f"pip install 'hsa-compile[{EXTRAS[package]}]'"
