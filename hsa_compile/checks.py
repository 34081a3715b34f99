"""Checks of single values, wherever they come from; each message shows the value and what is allowed."""

from collections.abc import Collection
from typing import Any

from hsa_compile.errors import HSACompileError, InvalidArgument

MAX_TEXT = 1000


def check_count(
    name: str, value: object, low: int, high: int, *, error: type[HSACompileError] = InvalidArgument
) -> None:
    """Raises the error unless the value is an integer from `low` to `high`, both included."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise error(f"{name} = {value!r} must be an integer in {low} … {high}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raises InvalidArgument unless the value is a number from `low` to `high`, both included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidArgument(f"{name} = {value!r} must be a number in {low:g} … {high:g}")


def check_flag(name: str, value: object, *, error: type[HSACompileError] = InvalidArgument) -> None:
    """Raises the error unless the value is True or False."""
    if not isinstance(value, bool):
        raise error(f"{name} = {value!r} must be True or False")


def check_text(name: str, value: object, *, error: type[HSACompileError] = InvalidArgument) -> None:
    """Raises the error unless the value is a text that any file and terminal can take.

    It has at most 1000 characters; control characters and lone surrogates are not allowed.
    """
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_TEXT:
        raise error(f"{name} = {value!r} must be a text of at most {MAX_TEXT} printable characters")


def check_choice(
    name: str, value: object, allowed: Collection[str], *, error: type[HSACompileError] = InvalidArgument
) -> None:
    """Raises the error unless the value is one of the allowed."""
    if value not in allowed:
        raise error(f"{name} = {value!r} is not one of {', '.join(allowed)}")


def pair(name: str, value: Any) -> tuple[int, int]:
    """Returns (the fewest, the most) as a tuple; raises InvalidArgument unless they are two counts in that order."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InvalidArgument(f"{name} = {value!r} must be two integers: the fewest and the most")
    for item in value:
        check_count(name, item, 1, 1000)
    least, most = value
    if least > most:
        raise InvalidArgument(f"{name} = {list(value)!r} must have the smaller number first")
    return least, most
