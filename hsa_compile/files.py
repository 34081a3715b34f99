"""Writes and reads files that are there as a whole or not at all: JSON, and tensors without pickle."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hsa_compile.errors import SaveError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file: at any moment the old one or the new one is there as a whole, never a part.

    Args:
        path: where the file is.
        write: fills the file whose path it is given.

    Raises:
        SaveError: the file cannot be written; the old one is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise SaveError(f"{path} cannot be written ({error}); what was there is untouched") from error


def sync_directory(directory: Path) -> None:
    """Waits until names that came or went in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Makes a directory and those above it, unless they are there.

    Raises:
        SaveError: the directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{directory} cannot be made: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a value as an indented JSON file, as a whole or not at all (`replace_file`)."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
        SaveError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SaveError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # the text is no JSON or no UTF-8
        raise SaveError(f"{path} is damaged or no JSON: {error}") from error
    if not isinstance(value, dict):
        raise SaveError(f"{path} holds a JSON {type(value).__name__}; an object is needed")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors, and strings beside them, as a safetensors file, as a whole or not at all (`replace_file`)."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **metadata}  # what `transformers` asks for
    replace_file(path, lambda temporary: save_file(whole, temporary, metadata=metadata))


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the strings that a safetensors file holds beside its tensors.

    Raises:
        SaveError: there is no such file, it is truncated, or it is of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{path} cannot be read: {_reason(error)}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, as copies in the CPU's memory that do not depend on the file.

    Raises:
        SaveError: there is no such file, it is truncated, or it is of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 it is no mapping
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{path} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"truncated, damaged or no safetensors file ({error})"
