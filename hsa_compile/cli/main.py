"""The command line's door: finds the command that is called, and turns errors into one line and an exit code.

A command's file is imported when that command is called: --help, --version and the completion of a shell are quick.
"""

import importlib
import platform
import sys
import warnings

import click
from click.shell_completion import CompletionItem

from hsa_compile import __version__
from hsa_compile.cli.warning_lines import show_warning
from hsa_compile.errors import HSACompileError, InvalidArgument, MissingDependency

USER_ERROR = 2
FAILURE = 1
INTERRUPTED = 130


# Name of a command → where it is defined, and the line that `hsa-compile --help` shows for it.
_COMMANDS = {
    "bench": ("bench:bench", "Time the ops against what one would run instead."),
    "doctor": ("doctor:doctor", "Device, versions, cache, and what will work here; a line each."),
    "emit": ("emit:emit", "Print the kernel that would run, here or on a named GPU."),
    "eval": ("eval:evaluate", "Needles in haystacks by length and depth, and perplexity."),
    "generate": ("generate:generate", "Continue a text with a model."),
    "inspect": ("inspect:inspect", "Compile kernels for a named GPU: registers, spills, bounds."),
    "model": ("model:model", "The bundled language model."),
    "plan": ("plan:plan", "Show what `tune` with the same flags would do."),
    "prepare": ("prepare:prepare", "Turn text into a corpus that training maps into memory."),
    "profile": ("profile:profile", "Show where the time of one warmed-up step goes."),
    "report": ("report:report", "Write a search as HTML and PNG."),
    "schedules": ("schedules:schedules", "List, show, explain, compare, move or remove tuned schedules."),
    "train": ("train:train", "Train a model."),
    "tune": ("tune:tune", "Find the fastest schedule on this machine, and store it."),
}


class Commands(click.Group):
    """The group of `_COMMANDS`; to name them, it imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, function = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(f"hsa_compile.cli.{module}"), function)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        commands = [
            CompletionItem(name, help=line) for name, (_, line) in _COMMANDS.items() if name.startswith(incomplete)
        ]
        return commands + click.Command.shell_complete(self, ctx, incomplete)


def _print_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """Prints and ends, if the flag was given; versions are those of the installed packages, which are not imported."""
    if not asked or context.resilient_parsing:
        return
    from hsa_compile.versions import installed_versions

    versions = installed_versions()
    click.echo(f"hsa-compile, version {__version__}")
    click.echo(f"torch {versions['torch']}, Triton {versions['triton']}, Python {platform.python_version()}")
    context.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
              help="Show the versions of hsa-compile, PyTorch, Triton and Python.")  # fmt: skip
def cli() -> None:
    """Compiler-style autotuning for Hierarchical Sparse Attention (HSA).

    Emits attention kernels for the device at hand, searches their schedule, and keeps the winners in a cache that
    hsa_attention reads when the package is imported.

    \b
    Start with:
      hsa-compile doctor         what works on this machine
      hsa-compile tune           tune the default problem
      hsa-compile schedules list see what was found
    """


def main() -> None:
    """Runs the command line and exits: 0 done, 1 failed, 2 wrong input or a missing package, 130 interrupted."""
    warnings.showwarning = show_warning
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = USER_ERROR
    except click.UsageError as error:
        code = _fail(_with_allowed(error), USER_ERROR)
    except click.ClickException as error:
        code = _fail(error.format_message(), USER_ERROR)
    except (InvalidArgument, MissingDependency) as error:
        code = _fail(str(error), USER_ERROR)
    except HSACompileError as error:
        code = _fail(str(error), FAILURE)
    except (KeyboardInterrupt, click.Abort):
        code = _fail("interrupted; what was finished is stored, run the same command to go on", INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep the interpreter from complaining at exit.
        sys.stderr.close()
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _with_allowed(error: click.UsageError) -> str:
    """Click's message, and for a word that is no command or flag those that are."""
    message = error.format_message()
    if error.ctx is None or isinstance(error, click.BadParameter | click.BadOptionUsage):
        return message
    command = error.ctx.command
    flags = [flag for option in command.get_params(error.ctx) for flag in option.opts if flag.startswith("--")]
    commands = command.list_commands(error.ctx) if isinstance(command, click.Group) else []
    return f"{message.rstrip('.')}; allowed are {', '.join([*commands, *flags])}"


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code
