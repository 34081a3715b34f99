"""One at a time on each device: a lock that all tuning processes of a host share."""

import platform
import re

import filelock
import torch

from hsa_compile.paths import source_dir


def device_lock(device: str) -> filelock.BaseFileLock:
    """The lock of a device, by what the hardware is called rather than by its number in this process.

    The operating system releases it when its holder dies. It lies beside the emitted kernels, where a read-only
    home does not matter, and carries the host's name, since hosts may share that directory.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{platform.node()} {_hardware(torch.device(device))}")
    return filelock.FileLock(source_dir() / f"device-{name}.lock")


def _hardware(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "uuid", f"{properties.name} {device.index}"))
