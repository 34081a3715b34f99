"""How tables, bars and help look at any width, and which flags stand together."""

import ast
import contextlib
import io
import os
import pty
import struct
import termios
from fcntl import ioctl
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from shell import Shell
from test_cli import COMMANDS

import hsa_compile
from hsa_compile.cli.main import cli
from hsa_compile.cli.models.argument import device_of
from hsa_compile.cli.options import FiniteFloat, RestrictedOption, counted, print_rows
from hsa_compile.errors import InvalidArgument
from hsa_compile.log import progress_bar

LEGEND = dict.fromkeys(("number", "problem", "note", *"abcd"), "seven")

ROWS = [{"number": "1", "problem": "one two three four five " * 4, "note": "six seven eight nine ten " * 3}]


@pytest.mark.parametrize(("terminal", "columns", "lines"), [(True, 80, 5), (True, 400, 3), (False, 80, 3)])
def test_a_table_fits_the_terminal_and_is_whole_elsewhere(
    terminal: bool, columns: int, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    print_rows(ROWS, as_json=False, legend=LEGEND)
    printed, _, legend = capsys.readouterr().out.partition("\n\n")
    assert legend.splitlines() == ["number   seven", "problem  seven", "note     seven"]
    printed = printed.splitlines()
    assert len(printed) >= lines if terminal and columns == 80 else len(printed) == lines
    if terminal:
        assert max(map(len, printed)) <= columns
    words = " ".join(printed).split()
    assert words.count("three") == 4
    assert words.count("eight") == 3


@pytest.mark.parametrize("more", [1, 6])
def test_a_table_of_numbers_and_of_many_columns_fits_a_terminal(
    more: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    row = {"problem": "hsa_forward B1 T128 HQ4 H1 D16", "schedule": "chunk rows=24 super_tile=128", "bytes": "25,351"}
    row |= {f"column{number}": "x" * 12 for number in range(more)}
    print_rows([row] * 2, as_json=False, legend=dict.fromkeys(row, "seven"))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert all(out.split().count(word) >= 2 for cell in row.values() for word in cell.split())


def test_a_table_of_long_words_ends_even_if_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_rows([dict.fromkeys("abcd", "x" * 50)], as_json=False, legend=LEGEND)
    assert capsys.readouterr().out.count("x") == 200


def test_one_is_not_many() -> None:
    assert (counted(1, "core"), counted(2, "core")) == ("1 core", "2 cores")


def restricted() -> list[tuple[tuple[str, ...], RestrictedOption, str]]:
    """Each flag of each command with one that it excludes, or that it needs."""
    found = []
    for path, command in COMMANDS.items():
        for option in command.params:
            if isinstance(option, RestrictedOption):
                found += [(path, option, other) for other in (*option.excludes, *filter(None, [option.needs]))]
    return found


def words_for(option: click.Parameter) -> list[str]:
    """An option as somebody might type it, with a value that it takes."""
    (flag, *_), kind = option.opts, option.type
    if getattr(option, "is_flag", False):
        return [flag]
    if isinstance(kind, click.Choice):
        return [flag, kind.choices[0]]
    values = {"DTYPE[,DTYPE…]": "fp32", "filename": __file__, "directory": str(Path(__file__).parent)}
    return [flag, values.get(kind.name, "1")]


@pytest.mark.parametrize(("path", "option", "other"), restricted(), ids=lambda value: getattr(value, "name", None))
def test_flags_that_do_not_go_together_are_refused_before_anything_is_done(
    path: tuple[str, ...], option: RestrictedOption, other: str, run: Shell, tmp_path: Path
) -> None:
    beside = next(one for one in COMMANDS[path].params if other in one.opts)
    needed = [one for one in COMMANDS[path].params if isinstance(one, click.Argument) and one.required]
    words = [*path, *(["x"] * len(needed)), *words_for(option)]
    if other in option.excludes:
        words += words_for(beside)
    done = run(*words, *(["--model", "tiny"] if path == ("generate",) else []))
    assert done.code == 2, words
    (line,) = done.err.splitlines()
    verb = "exclude each other" if other in option.excludes else "needs"
    assert verb in line, line
    assert option.opts[0] in line
    assert other in line or verb == "exclude each other"
    assert option.because in line


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_no_number_may_be_infinite_or_not_a_number(value: str, run: Shell) -> None:
    kinds = [(*path, *option.opts) for path, command in COMMANDS.items() for option in command.params
             if isinstance(option.type, click.FloatRange) and not isinstance(option.type, FiniteFloat)]  # fmt: skip
    assert not kinds
    done = run("tune", "--timeout", value)
    assert (done.code, done.out) == (2, "")
    assert f"Invalid value for '--timeout': '{value}' is not a finite number" in done.err


@pytest.mark.parametrize("name", ["cuda:01", "cuda:٣", "cuda:1000", "cuda:99999999999999999999", "cpu:0", "mps"])
def test_what_is_no_name_of_a_device_is_refused_in_one_line(name: str, run: Shell) -> None:
    for command in (["tune", "--device"], ["bench", "--device"]):
        done = run(*command, name)
        assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
        assert f"device '{name}' is not known; allowed are auto, cpu, cuda, cuda:N" in done.err
    with pytest.raises(InvalidArgument, match="device 'cuda:999' is not here; allowed are auto, cpu"):
        device_of("cuda:999")


def test_several_devices_are_refused_where_one_is_used(run: Shell) -> None:
    done = run("tune", "--device", "cpu,cpu", "--in-process")
    assert (done.code, done.out) == (2, "")
    assert "--in-process uses one device, --device names 2: cpu,cpu" in done.err


def test_flags_of_our_tasks_are_refused_beside_those_of_the_harness_alone(run: Shell) -> None:
    done = run("eval", "--harness", "lambada_openai", "--lengths", "4k")
    assert done.code == 2
    assert "--lengths is for tasks of ours: beside --harness lambada_openai it needs --task" in done.err


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("path", [(), *COMMANDS], ids=" ".join)
def test_help_fits_the_terminal(path: tuple[str, ...], width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    done = CliRunner().invoke(cli, [*path, "--help"], terminal_width=width, prog_name="hsa-compile")
    assert done.exit_code == 0
    assert not [line for line in done.output.splitlines() if len(line) > width]
    assert "\x1b" not in done.output


def test_a_bar_fits_the_terminal_and_stays_out_of_pipes() -> None:
    pipe = io.StringIO()
    for _ in range(3):
        progress_bar(3, "x" * 30, file=pipe).update()
    assert pipe.getvalue() == ""
    terminal, stderr = pty.openpty()
    ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    text = "{desc} {bar} {n_fmt}/{total_fmt}{postfix}"
    with os.fdopen(stderr, "w") as file, progress_bar(400, "select_chunks_backward", bar_format=text, file=file) as bar:
        bar.set_postfix_str("best 0.123 ms (1.23x), 3 failed, 55 s left", refresh=False)
        bar.update(123)
        bar.refresh()
    pieces = []
    with contextlib.suppress(OSError):  # the end of what a terminal shows that nobody has open
        while piece := os.read(terminal, 4096):
            pieces.append(piece)
    os.close(terminal)
    lines = [line for line in b"".join(pieces).decode().replace("\n", "\r").split("\r") if line.strip()]
    assert any("123/400, best 0.123 ms (1.23x), 3 failed, 55 s left" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_all_bars_are_made_in_one_place() -> None:
    package = Path(hsa_compile.__file__).parent
    makers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.startswith("tqdm") for name in names):
                makers.add(path.relative_to(package).as_posix())
    assert makers == {"log.py", "cli/main.py"}  # the latter writes warnings above a bar
