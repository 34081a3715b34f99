"""Versions of what a measurement depends on."""

from importlib import metadata
from pathlib import Path

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
