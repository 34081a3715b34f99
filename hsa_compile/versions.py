"""Versions of what a measurement depends on."""

from importlib import metadata

PACKAGES = ("hsa-compile", "torch", "triton", "optuna")


def installed_versions() -> dict[str, str]:
    """Package → version, `not installed` where it is missing."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
