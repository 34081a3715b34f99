"""Flags that several commands share: the shape of a problem, and how to print."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from hsa_compile.problem import DECODE_OPS, DTYPES, OPS, SELECT_OPS

F = TypeVar("F", bound=Callable[..., Any])

_MAX_DIGITS = 18  # Python refuses to read thousands
_SUFFIXES = {"k": 1 << 10, "m": 1 << 20}
_OP_NAMES = {
    "forward": OPS[:1],
    "backward": OPS[1:],
    "all": OPS,
    "select": SELECT_OPS[:1],
    "decode": DECODE_OPS,
    "every": (*OPS, *SELECT_OPS, *DECODE_OPS),
}
_NARROWEST = 16  # columns of a table on a narrow terminal
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


class Counts(click.ParamType):
    """Positive integers separated by commas; `4k` is 4096, `1m` is 1048576."""

    name = "N[,N…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        return [self._one(word.strip(), param, ctx) for word in str(value).split(",")]

    def _one(self, word: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        factor = _SUFFIXES.get(word[-1:].lower(), 1)
        digits = word[:-1] if factor > 1 else word
        if not digits.isdecimal() or len(digits) > _MAX_DIGITS or int(digits) < 1:
            self.fail(f"{word!r} is not a positive integer such as 64 or 16k", param, ctx)
        return int(digits) * factor


class Dtypes(click.ParamType):
    """Dtype names separated by commas."""

    name = "DTYPE[,DTYPE…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        if isinstance(value, list):
            return value
        names = [DTYPE_ALIASES.get(word.strip(), word.strip()) for word in str(value).split(",")]
        for name in names:
            if name not in DTYPES:
                self.fail(f"{name!r} is not one of {', '.join((*DTYPES, *DTYPE_ALIASES))}", param, ctx)
        return names


_SHAPE_FLAGS = (
    ("--batch", "batch", Counts(), "Sequences in a batch."),
    ("--seq-len", "seq_len", Counts(), "Tokens of a sequence (16k works)."),
    ("--heads", "num_heads", Counts(), "Query heads."),
    ("--kv-heads", "num_kv_heads", Counts(), "Key/value heads."),
    ("--head-dim", "head_dim", Counts(), "Size of a head."),
    ("--chunk-size", "chunk_size", Counts(), "Keys in a chunk."),
    ("--top-k", "top_k", Counts(), "Chunks that a token picks."),
    ("--dtype", "dtype", Dtypes(), "Of q, k and v."),
)
SHAPE_FIELDS = tuple(field for _, field, _, _ in _SHAPE_FLAGS)


def shape_options(command: F) -> F:
    """Adds the flags of a problem's shape; each accepts several values."""
    for flag, field, kind, text in reversed(_SHAPE_FLAGS):
        command = click.option(flag, field, type=kind, help=text)(command)
    return command


def op_option(default: str) -> Callable[[F], F]:
    """Adds `--op`, which gives a tuple of op names."""
    return click.option(
        "--op",
        "ops",
        type=click.Choice(list(_OP_NAMES)),
        default=default,
        show_default=True,
        callback=lambda ctx, param, value: _OP_NAMES[value],
        help="Of hsa_attention forward, backward or both (all); select_chunks; hsa_decode, one token; every one.",
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def print_rows(rows: Sequence[dict[str, Any]], *, as_json: bool, empty: str = "nothing to show") -> None:
    """Rows with equal keys as a table, or as a JSON list."""
    if as_json:
        print_json(list(rows))
    elif rows:
        click.echo(fitted_table([list(row.values()) for row in rows], list(rows[0])))
    else:
        click.echo(empty)


def fitted_table(cells: Sequence[Sequence[Any]], headers: Sequence[str], *, numbers: bool = True) -> str:
    """As wide as its words; on a terminal that is narrower, the widest columns are broken between words.

    Args:
        numbers: aligns what looks like a number to the right.
    """
    import tabulate

    options: dict[str, Any] = {"headers": headers, "disable_numparse": not numbers}
    table = tabulate.tabulate(cells, **options)
    terminal = shutil.get_terminal_size().columns
    limits = [max(len(str(cell)) for cell in column) for column in zip(*cells, strict=True)]
    while sys.stdout.isatty() and _width(table) > terminal and max(limits) > _NARROWEST:
        widest = limits.index(max(limits))
        limits[widest] = max(_NARROWEST, limits[widest] - (_width(table) - terminal + 1) // 2)
        table = tabulate.tabulate(cells, **options, maxcolwidths=[limit or None for limit in limits])
    return table


def _width(text: str) -> int:
    return max(len(line) for line in text.splitlines())


def counted(count: int, noun: str) -> str:
    """`1 core`, `2 cores`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_json(value: Any) -> None:
    """A value as indented JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
