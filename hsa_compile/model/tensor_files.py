"""Tensors in files, without pickle."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hsa_compile.checks import one_line
from hsa_compile.errors import SaveError
from hsa_compile.files import replace_file


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Tensors with strings beside them as a safetensors file, by `replace_file`."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **metadata}  # what `transformers` asks for

    def write(temporary: Path) -> None:
        try:
            save_file(whole, temporary, metadata=metadata)
        except SafetensorError as error:  # the disk is full, for example
            raise OSError(str(error)) from error

    replace_file(path, write)


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in a safetensors file.

    Raises:
        SaveError: there is no such file, it is truncated, or it is of another kind.
    """
    with _opened(path) as file:
        return file.metadata() or {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, in memory of the CPU that is no more tied to the file.

    Raises:
        SaveError: there is no such file, it is truncated, or it is of another kind.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 it is no mapping


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise SaveError(f"{path} cannot be read: it is no regular file")
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{path} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"truncated, damaged or no safetensors file ({one_line(error)})"
