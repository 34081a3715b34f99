"""What a page shows as a command line, the command line knows: shared by the tests of the README and of the docs."""

import re

from click.testing import CliRunner

from hsa_compile.cli.main import cli


def check_shown_commands(text: str) -> int:
    """Asserts that each `hsa-compile` line names a command and flags that exist; returns how many lines there are."""
    shown = re.findall(r"^(?:\$ )?hsa-compile (.+?)(?:\s+#.*)?$", text, re.MULTILINE)
    for line in shown:
        words = line.split()
        command = [word for word in words[:2] if re.fullmatch(r"[a-z]+", word)]
        done = CliRunner().invoke(cli, [*command, "--help"])
        if done.exit_code and len(command) == 2:  # the second word was an argument
            done = CliRunner().invoke(cli, [command[0], "--help"])
        assert done.exit_code == 0, f"{line}\n{done.output}"
        for flag in re.findall(r"(?<=\s)--[a-z-]+", line):
            assert flag in done.output, f"{flag} of '{line}'"
    return len(shown)
