"""The command line and the package start without what they do not need yet."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

import hsa_compile
from hsa_compile.cli.main import cli

ROOT = Path(hsa_compile.__file__).parent

# Runs commands one after the other in this process, as JSON in the first argument; prints what each printed.
RUN = """
import contextlib, io, json, sys
from click.shell_completion import ShellComplete
from hsa_compile.cli.main import cli

commands, completions, watched = json.loads(sys.argv[1])
printed = []
for words in commands:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(out):
        cli.main(words, standalone_mode=False)
    out.flush()
    printed.append(out.buffer.getvalue().decode())
for *before, last in completions:
    found = ShellComplete(cli, {}, "hsa-compile", "_HSA_COMPILE_COMPLETE").get_completions(before, last)
    printed.append([item.value for item in found])
print(json.dumps([printed, [name for name in watched if name in sys.modules]]))
"""


def run_in_one_process(commands: list[list[str]], completions: list[list[str]], *watched: str) -> tuple[Any, Any]:
    """What commands and completions printed, and which of the watched modules had been imported at the end."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, json.dumps([commands, completions, watched])],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": "there-is-no-such-compiler"},
    )
    assert done.returncode == 0, done.stderr
    printed, imported = json.loads(done.stdout.splitlines()[-1])
    return printed, imported


def test_help_versions_completion_and_the_list_of_schedules_import_no_torch() -> None:
    helps = [["--help"], ["model", "info", "--help"], ["schedules", "explain", "--help"]]
    helps += [[name, "--help"] for name in cli.commands]
    commands = [*helps, ["--version"], ["schedules", "list"], ["emit", "--target", "sm_90"]]
    completions = [[""], ["tune", "--se"], ["tune", "--sampler", ""], ["eval", "--memory", "d"], ["schedules", "ex"]]
    printed, imported = run_in_one_process(commands, completions, "torch", "optuna", "scipy")
    assert imported == []
    assert all("Usage:" in text for text in printed[: len(helps)])
    assert printed[len(commands) :] == [
        sorted(cli.commands),
        ["--seq-len", "--seed"],
        ["ours", "tpe", "random", "grid", "gp", "cmaes"],
        ["device", "disk"],
        ["explain", "export"],
    ]


def test_commands_that_compile_no_model_import_no_torch_dynamo() -> None:
    shape = ["--seq-len", "128", "--heads", "4", "--kv-heads", "1", "--head-dim", "16", "--chunk-size", "16"]
    commands = [
        ["doctor"],
        ["plan", *shape, "--device", "cpu"],
        ["tune", *shape, "--device", "cpu", "--op", "forward", "--trials", "2", "--in-process"],
        ["model", "info", "tiny", "--variant", "ramba"],
        ["generate", "--model", "tiny", "--device", "cpu", "--prompt", "abc", "--max-new-tokens", "2"],
    ]
    _, imported = run_in_one_process(commands, [], "torch", "torch._dynamo")
    assert imported == ["torch"]


def test_each_command_is_found_under_its_name() -> None:
    for name in cli.commands:
        _, command, _ = cli.resolve_command(click.Context(cli), [name])
        assert command is not None
        assert command.name == name


def test_public_names_come_from_where_type_checkers_see_them() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (seen,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in seen.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: node.module for node in imports for alias in node.names}
    assert homes == hsa_compile._HOMES
    assert sorted(homes) == sorted(hsa_compile.__all__)
    # An imported submodule becomes an attribute of the package, and would hide a function of its name.
    assert not set(homes) & {path.stem for path in ROOT.iterdir()}
