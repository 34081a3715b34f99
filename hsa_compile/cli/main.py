"""The command line's door: collects the commands, and turns errors into one line and an exit code."""

import sys
import warnings

import click

from hsa_compile.cli.bench import bench
from hsa_compile.cli.doctor import doctor
from hsa_compile.cli.emit import emit
from hsa_compile.cli.eval import evaluate
from hsa_compile.cli.generate import generate
from hsa_compile.cli.inspect import inspect
from hsa_compile.cli.model import model
from hsa_compile.cli.plan import plan
from hsa_compile.cli.prepare import prepare
from hsa_compile.cli.profile import profile
from hsa_compile.cli.report import report
from hsa_compile.cli.schedules import schedules
from hsa_compile.cli.train import train
from hsa_compile.cli.tune import tune
from hsa_compile.cli.version import print_version
from hsa_compile.cli.warning_lines import show_warning
from hsa_compile.errors import HSACompileError, InvalidArgument, MissingDependency

USER_ERROR = 2
FAILURE = 1
INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version,
              help="Show the version, PyTorch, Triton and the device.")  # fmt: skip
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


for command in (
    tune,
    plan,
    report,
    schedules,
    emit,
    inspect,
    prepare,
    model,
    train,
    evaluate,
    generate,
    bench,
    profile,
    doctor,
):
    cli.add_command(command)


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
    commands = list(command.commands) if isinstance(command, click.Group) else []
    return f"{message.rstrip('.')}; allowed are {', '.join([*commands, *flags])}"


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code
