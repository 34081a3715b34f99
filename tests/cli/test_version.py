"""`--version`, and what a shell completes."""

import os
import subprocess
import sys

import torch
from click.shell_completion import ShellComplete
from shell import Shell

from hsa_compile import __version__
from hsa_compile.cli.main import cli
from hsa_compile.versions import installed_versions


def test_the_version_names_torch_triton_and_python(run: Shell) -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.err) == (0, "")
    first, second = outcome.out.splitlines()
    assert first == f"hsa-compile, version {__version__}"
    release = torch.__version__.split("+")[0]  # a wheel from PyPI leaves out what it was built for
    assert second.startswith(f"torch {release}")
    assert f", Triton {installed_versions()['triton']}, Python 3." in second


def completed(words: str) -> list[str]:
    """What a shell would offer for the last of these words."""
    *before, last = words.split(" ")
    completion = ShellComplete(cli, {}, "hsa-compile", "_HSA_COMPILE_COMPLETE")
    return [item.value for item in completion.get_completions(before[1:], last)]


def test_a_shell_completes_commands_flags_and_choices() -> None:
    assert completed("hsa-compile ") == sorted(cli.commands)
    assert completed("hsa-compile sche") == ["schedules"]
    assert "--seq-len" in completed("hsa-compile tune --se")
    assert completed("hsa-compile tune --op for") == ["forward"]


def test_the_script_for_bash_is_printed() -> None:
    environment = {**os.environ, "_HSA_COMPILE_COMPLETE": "bash_source"}
    script = "import sys; sys.argv[0] = 'hsa-compile'; from hsa_compile.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert "complete -o nosort -F" in done.stdout
    assert "hsa-compile" in done.stdout
