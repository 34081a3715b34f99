"""Checks of single values, wherever they come from; each message shows the value and what is allowed."""

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from hsa_compile.errors import HSACompileError, InvalidArgument

MAX_TEXT = 1000

T = TypeVar("T")

_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = 200


def shown(value: object) -> str:
    """Writes a value for a message, in one line that any terminal can take; a long or deep one is cut."""
    if isinstance(value, int) and abs(value) >= 10**_short.maxlong:
        return "an integer of more than 200 digits"
    return _short.repr(value)


def one_line(text: object, most: int = 300) -> str:
    """Writes a text that may hold anything in one line that any terminal can take; one longer than `most` is cut."""
    words = " ".join(str(text).split())[: most + 1]
    line = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in words)
    return line if len(line) <= most else f"{line[:most]}…"


def check_count(
    name: str, value: object, low: int, high: int, *, error: type[HSACompileError] = InvalidArgument
) -> None:
    """Raises the error unless the value is an integer from `low` to `high`, both included."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise error(f"{name} = {shown(value)} must be an integer in {low} … {high}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raises InvalidArgument unless the value is a number from `low` to `high`, both included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidArgument(f"{name} = {shown(value)} must be a number in {low:g} … {high:g}")


def check_flag(name: str, value: object, *, error: type[HSACompileError] = InvalidArgument) -> None:
    """Raises the error unless the value is True or False."""
    if not isinstance(value, bool):
        raise error(f"{name} = {shown(value)} must be True or False")


def check_text(name: str, value: object, *, error: type[HSACompileError] = InvalidArgument) -> None:
    """Raises the error unless the value is a text that any file and terminal can take.

    It has at most 1000 characters; control characters and lone surrogates are not allowed.
    """
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_TEXT:
        raise error(f"{name} = {shown(value)} must be a text of at most {MAX_TEXT} printable characters")


def check_choice(
    name: str, value: object, allowed: Collection[str | int], *, error: type[HSACompileError] = InvalidArgument
) -> None:
    """Raises the error unless the value is one of the allowed."""
    if type(value) not in (str, int) or value not in allowed:
        raise error(f"{name} = {shown(value)} is not one of {', '.join(map(str, allowed))}")


def check_texts(name: str, value: object) -> None:
    """Raises InvalidArgument unless the value is a mapping of texts to texts (`check_text`)."""
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{name} = {shown(value)} must be a mapping of texts to texts")
    for key, text in value.items():
        check_text(f"a name in {name}", key)
        check_text(f"{name} of {key}", text)


def from_mapping(cls: type[T], values: object) -> T:
    """Makes a dataclass from a mapping of its fields that a file holds; the class itself checks each value.

    Raises:
        InvalidArgument: it is no mapping, or a field is missing or unknown.
    """
    if not isinstance(values, Mapping):
        raise InvalidArgument(f"{cls.__name__} is {shown(values)}, not a mapping")
    specs = {spec.name: spec for spec in fields(cls)}  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in specs]:
        raise InvalidArgument(f"{cls.__name__} has unknown fields {shown(unknown)}")
    missing = [
        name for name, spec in specs.items()
        if name not in values and spec.default is MISSING and spec.default_factory is MISSING
    ]  # fmt: skip
    if missing:
        raise InvalidArgument(f"{cls.__name__} lacks {', '.join(missing)}")
    return cls(**values)


def pair(name: str, value: Any) -> tuple[int, int]:
    """Returns (the fewest, the most) as a tuple; raises InvalidArgument unless they are two counts in that order."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InvalidArgument(f"{name} = {shown(value)} must be two integers: the fewest and the most")
    for item in value:
        check_count(name, item, 1, 1000)
    least, most = value
    if least > most:
        raise InvalidArgument(f"{name} = {shown(list(value))} must have the smaller number first")
    return least, most
