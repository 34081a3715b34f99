"""What several commands share: flags of a problem's shape, printing, Ctrl-C, and the problems that flags stand for."""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from hsa_compile.problem import DECODE_OPS, DTYPES, OPS, SELECT_OPS, Problem
from hsa_compile.target import Target

F = TypeVar("F", bound=Callable[..., Any])

_MAX_DIGITS = 18  # Python refuses to read thousands of digits
_SUFFIXES = {"k": 1 << 10, "m": 1 << 20}
OP_NAMES = {
    "forward": OPS[:1],
    "backward": OPS[1:],
    "attention": OPS,
    "select": SELECT_OPS[:1],
    "all": (*OPS, *SELECT_OPS[:1]),
    "decode": DECODE_OPS,
    "every": (*OPS, *SELECT_OPS, *DECODE_OPS),
}
_WIDEST_TEXT = 100  # the most letters of a line of text
_NARROWEST = 16  # the least width of a table's column on a narrow terminal
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


class RestrictedOption(click.Option):
    """A flag that some others make meaningless, or that means nothing without another: both are refused in one line.

    Args:
        excludes: the flags that it cannot stand beside.
        needs: the flag that it cannot stand without.
        because: the rest of the message, which says why.
    """

    def __init__(
        self, *args: Any, excludes: Sequence[str] = (), needs: str | None = None, because: str, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.excludes, self.needs, self.because = tuple(excludes), needs, because

    def handle_parse_result(self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]) -> Any:
        """Looks at what the command line has, before defaults are filled in."""
        if self.name in opts and not ctx.resilient_parsing:
            given = [flag for other in ctx.command.params if other.name in opts for flag in other.opts]
            for flag in given:
                if flag in self.excludes:
                    raise click.UsageError(f"{self.opts[0]} and {flag} exclude each other: {self.because}")
            if self.needs is not None and self.needs not in given:
                raise click.UsageError(f"{self.opts[0]} needs {self.needs}: {self.because}")
        return super().handle_parse_result(ctx, opts, args)


def given_flags(*flags: str) -> list[str]:
    """Returns those of the flags that the command line has."""
    context = click.get_current_context()
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name and context.get_parameter_source(option.name) == ParameterSource.COMMANDLINE
    ]
    return [flag for flag in flags if flag in given]


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


class FiniteFloat(click.FloatRange):
    """A number within bounds; `inf` and `nan`, which Python reads as numbers, are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


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


# What `tune` takes where no flag is given: the published HSA shapes (head group of 16, chunks of 64) at a size that
# a CPU tunes in two minutes, or at one that keeps a GPU busy.
_CPU_DEFAULTS = {
    "batch": 1, "seq_len": 4096, "num_heads": 16, "num_kv_heads": 1, "head_dim": 64, "chunk_size": 64, "top_k": 8,
    "dtype": "float32",
}  # fmt: skip
_GPU_DEFAULTS = {
    "batch": 1, "seq_len": 16384, "num_heads": 32, "num_kv_heads": 2, "head_dim": 128, "chunk_size": 64, "top_k": 16,
    "dtype": "bfloat16",
}  # fmt: skip
_SHAPE_FLAGS = (
    ("--batch", "batch", Counts(), "How many sequences a batch has."),
    ("--seq-len", "seq_len", Counts(), "How many tokens a sequence has (16k works)."),
    ("--heads", "num_heads", Counts(), "How many query heads."),
    ("--kv-heads", "num_kv_heads", Counts(), "How many key/value heads."),
    ("--head-dim", "head_dim", Counts(), "How wide a head is."),
    ("--chunk-size", "chunk_size", Counts(), "How many keys a chunk has."),
    ("--top-k", "top_k", Counts(), "How many chunks a token picks."),
    ("--dtype", "dtype", Dtypes(), "Dtype of q, k and v."),
)
SHAPE_FIELDS = tuple(field for _, field, _, _ in _SHAPE_FLAGS)
SHAPE_NAMES = tuple(flag for flag, _, _, _ in _SHAPE_FLAGS)
GAIN = "the default schedule's time over that of this one"  # what a column says that shows a gain


def shape_options(**defaults: str) -> Callable[[F], F]:
    """Adds the flags of a problem's shape; each accepts several values.

    Args:
        defaults: what help says of fields whose default is not that of `default_fields`.
    """

    def add(command: F) -> F:
        for flag, field, kind, text in reversed(_SHAPE_FLAGS):
            default = defaults.get(field, by_device(_CPU_DEFAULTS[field], _GPU_DEFAULTS[field]))
            command = click.option(flag, field, type=kind, show_default=default, help=text)(command)
        return command

    return add


def by_device(on_cpu: object, on_gpu: object) -> str:
    """Writes a default that may be another one on a GPU."""
    return str(on_cpu) if on_cpu == on_gpu else f"{on_cpu}; on a GPU {on_gpu}"


def shape_flags(chosen: Mapping[str, Sequence[Any]]) -> str:
    """Writes the flags of a shape as a person types them, each after a blank."""
    named = ((flag, chosen[field]) for flag, field, _, _ in _SHAPE_FLAGS if field in chosen)
    return "".join(f" {flag} {','.join(map(str, values))}" for flag, values in named)


def problem_options(default_op: str) -> Callable[[F], F]:
    """Adds the flags that say which problems are meant, and which `asked_problems` reads."""
    add_op = click.option(
        "--op",
        type=click.Choice(list(OP_NAMES)),
        default=default_op,
        show_default=True,
        help="What is meant: forward or backward of hsa_attention, or attention, which is both; select: select_chunks; "
        "all: attention and select; decode: hsa_decode, for one new token; every: all of these, and the backward pass "
        "of select_chunks.",
    )
    add_problem = click.option(
        "--problem",
        multiple=True,
        cls=RestrictedOption,
        excludes=("--op", *SHAPE_NAMES),
        because="a problem has its op and its whole shape",
        metavar="PROBLEM",
        help="A problem as warnings, tables and traces write it, instead of an op and a shape; may be given several "
        "times.",
    )
    return lambda command: add_op(shape_options()(add_problem(command)))


def asked_problems(target: Target, flags: Mapping[str, Any]) -> list[Problem]:
    """Returns the problems that the flags of `problem_options` stand for.

    Raises:
        InvalidProblem: a value is out of range, or `--problem` is not written as `Problem.describe` writes it.
    """
    if flags["problem"]:
        return [Problem.parse(text) for text in flags["problem"]]
    return expand(target, {name: flags[name] for name in SHAPE_FIELDS if flags[name]}, OP_NAMES[flags["op"]])


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def print_rows(
    rows: Sequence[dict[str, Any]], *, as_json: bool, legend: Mapping[str, str], empty: str = "nothing to show"
) -> None:
    """Prints rows with equal keys as a table that explains itself, or as a JSON list.

    Args:
        rows: the rows; their keys name the columns.
        as_json: whether to print a JSON list.
        legend: what each column means, by its name.
        empty: what is said if there is no row.
    """
    if as_json:
        print_json(list(rows))
    elif rows:
        click.echo(fitted_table([list(row.values()) for row in rows], list(rows[0])) + "\n")
        print_legend({name: legend[name] for name in rows[0]})
    else:
        click.echo(empty)


def print_legend(legend: Mapping[str, str]) -> None:
    """Prints a line for each column of a table that says what it means, no wider than the terminal."""
    click.echo(_named_lines(legend.items(), min(_WIDEST_TEXT, shutil.get_terminal_size().columns)))


def fitted_table(cells: Sequence[Sequence[Any]], headers: Sequence[str], *, numbers: bool = True) -> str:
    """Makes a table with a line for each row, and fits it into the terminal if there is one.

    On a narrow terminal the widest columns are broken between words; where that is not enough, each row becomes a
    paragraph with a line for each column.

    Args:
        cells, headers: the rows, and the names of the columns.
        numbers: whether to align what looks like a number to the right.
    """
    import tabulate

    options: dict[str, Any] = {"headers": headers, "disable_numparse": not numbers}
    table = tabulate.tabulate(cells, **options)
    terminal = shutil.get_terminal_size().columns
    limits = [max(len(str(cell)) for cell in column) for column in zip(*cells, strict=True)]
    while sys.stdout.isatty() and _width(table) > terminal:
        if max(limits) <= _NARROWEST:
            return "\n\n".join(_named_lines(zip(headers, row, strict=True), terminal) for row in cells)
        widest = limits.index(max(limits))
        limits[widest] = max(_NARROWEST, limits[widest] - (_width(table) - terminal + 1) // 2)
        broken = [[_broken(cell, limit) for cell, limit in zip(row, limits, strict=True)] for row in cells]
        table = tabulate.tabulate(broken, **options)
    return table


def _broken(cell: Any, limit: int) -> Any:
    return textwrap.fill(str(cell), limit, break_on_hyphens=False) if len(str(cell)) > limit else cell


def _named_lines(pairs: Iterable[tuple[str, Any]], width: int) -> str:
    """Writes a line for each name and what belongs to it, broken at a width."""
    named = list(pairs)
    indent = max(len(name) for name, _ in named) + 2
    return "\n".join(
        textwrap.fill(f"{name:{indent}}{text}", width, subsequent_indent=" " * indent) for name, text in named
    )


def _width(text: str) -> int:
    return max(len(line) for line in text.splitlines())


def counted(count: int, noun: str, ending: str = "s") -> str:
    """Writes `1 core`, `2 cores`; `ending` is what makes the noun plural."""
    return f"{count} {noun}{'' if count == 1 else ending}"


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def stop_on_ctrl_c() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C sets; the second raises KeyboardInterrupt, as the first would have.

    Where this is not the main thread, which alone may catch signals, nothing is changed.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        message = "\nstopping: the candidate at hand, then a short play-off; Ctrl-C again stops at once"
        try:
            click.echo(message, err=True)
        except RuntimeError:  # the signal came while a line was being written, and Python lets no other into it
            os.write(2, f"{message}\n".encode())

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def default_fields(target: Target) -> dict[str, Any]:
    """Returns the fields of the problem that stands for a target where a person names none."""
    return dict(_CPU_DEFAULTS if target.kind == "cpu" else _GPU_DEFAULTS)


def expand(target: Target, chosen: Mapping[str, Sequence[Any]], ops: Sequence[str] = OPS) -> list[Problem]:
    """Makes a problem of every combination of the chosen values, the rest by default; ops of a shape stand together.

    Raises:
        InvalidProblem: a combination is not a problem.
    """
    fields = {name: (value,) for name, value in default_fields(target).items()}
    fields.update({name: tuple(values) for name, values in chosen.items() if values})
    shapes = [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
    return [_problem(op, shape) for shape in shapes for op in ops]


def _problem(op: str, shape: Mapping[str, Any]) -> Problem:
    """Makes a problem of a shape: a retrieval head is as wide as its kv head, and a decoded token is the last of its
    sequence, which lies in pages."""
    if op in DECODE_OPS:
        return Problem(op=op, **{**shape, "seq_len": 1, "kv_len": shape["seq_len"], "paged": True})
    heads = {"num_heads": shape["num_kv_heads"]} if op in SELECT_OPS else {}
    return Problem(op=op, **{**shape, **heads})
