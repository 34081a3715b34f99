"""Mutations of files: values of other types and sizes, nesting, bytes that are lost, added or flipped; all by a seed."""

import json
import math
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ROOM_BYTES = 2**30  # how much more memory than before a reader may take
CPU_SECONDS = 20  # a reader that computes for longer is taken to hang; waiting for other processes does not count
_DEEP = "\ue000"
_DEPTHS = (100, 500, 900, 200_000)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64, -(2**63), 10**400,
    0.5, -0.0, 1e-320, 1e300, -1e308, math.nan, math.inf, -math.inf,
    "", "a", "1", "true", "..", "../../x", "/dev/zero", "a\0b", "\x1b[31m", "\n", "\ud800", "é" * 2000, "f" * 64,
    [], {}, [0], [None], ["a"], [[1, 2], [3]], {"a": 1}, {"": {}}, _DEEP,
)  # fmt: skip


def mutated_json(data: bytes, draw: random.Random) -> bytes:
    """Returns JSON with one or two places changed in type, size or presence; now and then damaged bytes instead."""
    if draw.random() < 0.15:
        return mutated_bytes(data, draw)
    root = {"": json.loads(data)}
    for _ in range(draw.choice((1, 1, 2))):
        places = list(_places(root))
        if not places:
            break
        container, key = draw.choice(places)
        _change(container, key, draw, places)
    return json_bytes(root.get(""), draw)


def json_bytes(value: Any, draw: random.Random) -> bytes:
    """Writes a value as JSON; where it holds the sign for it, arrays or objects are nested deep."""
    depth = draw.choice(_DEPTHS)
    nested = "[" * depth + "]" * depth if draw.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth
    return json.dumps(value).replace(json.dumps(_DEEP), nested).encode()


def mutated_lines(data: bytes, draw: random.Random) -> bytes:
    """Returns JSON lines of which one is changed, lost, doubled or torn."""
    lines = data.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    how = draw.random()
    if how < 0.8:
        lines[at] = mutated_json(lines[at], draw).replace(b"\n", b"") + b"\n"
    elif how < 0.9:
        lines[at : at + 1] = draw.choice(([], [lines[at]] * 2, [b"\n"], [b"[]\n"], [b"\0" * 30 + b"\n"]))
    else:
        lines[-1] = lines[-1][: draw.randrange(len(lines[-1]))]
    return b"".join(lines)


def mutated_toml(data: bytes, draw: random.Random) -> bytes:
    """Returns TOML in which a value stands that TOML has and the field may not."""
    lines = data.decode().splitlines()
    at = draw.choice([number for number, line in enumerate(lines) if "=" in line])
    name = lines[at].partition("=")[0]
    values = (
        "inf", "-inf", "nan", "1e400", "9" * 400, "-1", "0", "0.5", "true", '""', '"a"', '"\\u0000"', "1979-05-27", "07:32:00",
        "[]", "{}", "[1, 2]", "[{}]", "{a = 1}", "[" * 100 + "]" * 100, "[" * 5000 + "]" * 5000, "'", "[[", "0x10", "2147483648",
    )  # fmt: skip
    how = draw.random()
    if how < 0.8:
        lines[at] = f"{name}= {draw.choice(values)}"
    elif how < 0.9:
        lines[at] = draw.choice((lines[at] * 2, f"x{lines[at]}", "[[model]]", "[stages]", "[data.corpus]", f"a.b.{lines[at]}"))
    else:
        return mutated_bytes(data, draw)
    return "\n".join(lines).encode()


def mutated_tensors(data: bytes, draw: random.Random) -> bytes:
    """Returns a safetensors file with another header, or with damaged bytes."""
    if draw.random() < 0.3:
        return mutated_bytes(data, draw)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if draw.random() < 0.5:
        tensors = [value for name, value in header.items() if name != "__metadata__"]
        draw.choice(tensors)["dtype"] = draw.choice(("F64", "F32", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X"))
        new = json.dumps(header).encode()
    else:
        new = mutated_json(json.dumps(header).encode(), draw)
    return len(new).to_bytes(8, "little") + new + data[end:]


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Returns bytes of which some are flipped, lost, doubled, set, or added."""
    if not data:
        return draw.randbytes(9)
    first = draw.randrange(len(data))
    last = min(len(data), first + draw.choice((1, 1, 8, 100)))
    part: bytes = draw.choice(
        (
            bytes([data[first] ^ (1 << draw.randrange(8))]) + data[first + 1 : last],
            b"",
            data[first:last] * 2,
            b"\xff" * (last - first),
            b"\0" * (last - first),
            draw.randbytes(last - first),
        )
    )
    whole = data[:first] + part + data[last:]
    return draw.choice((whole, whole, whole, data[:first], b"", data + part))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields each container with each of its keys, from the outside in."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _change(container: Any, key: Any, draw: random.Random, places: list[tuple[Any, Any]]) -> None:
    how = draw.random()
    if how < 0.7:
        container[key] = json.loads(json.dumps(draw.choice(_VALUES)))
    elif how < 0.8:
        del container[key]
    elif how < 0.9 and isinstance(container, dict):
        container[draw.choice(("more", "", "\ud800", f"{key}2"))] = container[key]
    else:
        other, name = draw.choice(places)
        container[key] = json.loads(json.dumps(other[name]))


@contextmanager
def limited() -> Iterator[None]:
    """Makes more than a gigabyte, and more than some seconds of computing, an error."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{CPU_SECONDS} s of computing")

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM_BYTES, before[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


Mutation = Callable[[bytes, random.Random], bytes]
