"""The command line's door: finds the command that is called, and turns errors into one line and an exit code.

A command's file is imported when that command is called, so that --help, --version and a shell's completion are quick.
"""

import contextlib
import importlib
import platform
import signal
import sys
import warnings
from collections.abc import Iterator

import click

from hsa_compile import __version__
from hsa_compile.checks import one_line
from hsa_compile.errors import DistantWarning, HSACompileError, InvalidArgument, MissingDependency, UntunedWarning
from hsa_compile.log import logger

_OF_A_MODEL = ("eval", "generate", "profile", "train")

_advised: set[str] = set()


def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Takes the place of `warnings.showwarning`; a progress bar on the terminal moves out of the way."""
    text = str(message)
    advice = _advice() if issubclass(category, UntunedWarning) else None
    if advice:
        # A model's lengths change with each prompt, so nothing is to be done about a nearest schedule that is far away.
        if advice in _advised or issubclass(category, DistantWarning):
            return
        _advised.add(advice)
        text = f"{text.partition(';')[0]}; {advice}"
    import tqdm

    tqdm.tqdm.write(f"warning: {one_line(text, _MOST)}", file=sys.stderr)


def _advice() -> str | None:
    """Names the one command that tunes all problems a model asks for; each warning would name its own."""
    context = click.get_current_context(silent=True)  # threads that a command started have none
    if context is None or context.info_name not in _OF_A_MODEL:
        return None
    if context.info_name == "train":
        return "with --tune, train first tunes what it needs"
    dtype = context.params["dtype"]
    flags = f" --dtype {dtype}" if dtype else ""
    return f"tune all that this model needs with: hsa-compile tune --preset {context.params['name']}{flags}"


USER_ERROR = 2
FAILURE = 1
INTERRUPTED = 130
TERMINATED = 143
_LONGEST = 500  # characters of an error that is not ours
_MOST = 20_000  # characters of a line of ours, which names all that is allowed


# Each command's name, where it is defined, and the line that `hsa-compile --help` shows for it.
_COMMANDS = {
    "tune": ("hsa_compile.cli.tuning.tune:tune", "Find the fastest schedule on this machine, and store it."),
    "plan": ("hsa_compile.cli.tuning.plan:plan", "Show what `tune` with the same flags would do."),
    "report": ("hsa_compile.cli.tuning.report:report", "Write what searches found as one HTML page."),
    "schedules": ("hsa_compile.cli.schedules:schedules", "List, show, explain, compare, move or remove schedules."),
    "emit": ("hsa_compile.cli.kernels:emit", "Print the kernel that would run, here or on a named GPU."),
    "inspect": ("hsa_compile.cli.kernels:inspect", "Compile kernels for a named GPU: registers, spills, bounds."),
    "prepare": ("hsa_compile.cli.models.prepare:prepare", "Turn text into a corpus that training reads."),
    "model": ("hsa_compile.cli.models.model:model", "Show what a model costs."),
    "train": ("hsa_compile.cli.models.train:train", "Train a model."),
    "eval": ("hsa_compile.cli.models.eval:evaluate", "Evaluate a model: tasks of retrieval, and perplexity."),
    "generate": ("hsa_compile.cli.models.generate:generate", "Continue a text with a model."),
    "bench": ("hsa_compile.cli.bench:bench", "Time the ops against what one would run instead."),
    "profile": ("hsa_compile.cli.models.profile:profile", "Show where the time of one warmed-up step goes."),
    "doctor": ("hsa_compile.cli.doctor:doctor", "Show the device, versions, cache, and what will work here."),
}


class LazyGroup(click.Group):
    """A group whose commands have a name and a short help; the real command is imported when it is called."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            module, _, attribute = _COMMANDS[name][0].partition(":")
            command = getattr(importlib.import_module(module), attribute)
        return name, command, rest


def _print_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """Prints and ends, if the flag was given; versions are those of the installed packages, which are not imported."""
    if not asked or context.resilient_parsing:
        return
    from hsa_compile.versions import installed_versions

    versions = installed_versions()
    click.echo(f"hsa-compile, version {__version__}")
    click.echo(f"torch {versions['torch']}, Triton {versions['triton']}, Python {platform.python_version()}")
    context.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
              help="Show the versions of hsa-compile, PyTorch, Triton and Python.")  # fmt: skip
def cli() -> None:
    """Compiler-style autotuning for Hierarchical Sparse Attention (HSA).

    Emits attention kernels for the device at hand, searches their schedule, and keeps the winners in a cache that
    hsa_attention reads when it is imported.

    \b
    Start with:
      hsa-compile doctor         what works on this machine
      hsa-compile tune           tune the default problem
      hsa-compile schedules list see what was found
    """


for _name, (_, _line) in _COMMANDS.items():
    cli.add_command(click.Command(_name, short_help=_line))


def main() -> None:
    """Runs the command line and exits: 0 done, 1 failed, 2 wrong input or a missing package, 130 or 143 interrupted.

    Whatever a command raises ends in one line; with `HSA_COMPILE_LOG=debug`, the traceback comes before it.
    """
    warnings.showwarning = show_warning
    with _terminable():
        code = _run()
    sys.exit(code if isinstance(code, int) else 0)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came. What stands ready for Ctrl-C does the same for this: children end, what was finished is stored."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:  # else whoever started this process wants something else of it
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)


def _run() -> object:
    try:
        return cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return USER_ERROR
    except click.UsageError as error:
        return _fail(_with_allowed(error), USER_ERROR)
    except click.ClickException as error:
        return _fail(error.format_message(), USER_ERROR)
    except (InvalidArgument, MissingDependency) as error:
        return _fail(str(error), USER_ERROR)
    except HSACompileError as error:
        return _fail(str(error), FAILURE)
    except (KeyboardInterrupt, click.Abort) as error:
        code = TERMINATED if isinstance(error.__cause__ or error, _Terminated) else INTERRUPTED
        return _fail("interrupted; what was finished is stored, run the same command to go on", code)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep the interpreter from complaining at exit.
        sys.stderr.close()
        return 0
    except Exception as error:  # noqa: BLE001 (the last net: no traceback reaches a user who did not ask for one)
        return _fail_unforeseen(error)


def _fail_unforeseen(error: Exception) -> int:
    logger.debug("the command ended with an error that it does not foresee", exc_info=error)
    if isinstance(error, OSError) and error.strerror:
        files = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return _fail(": ".join([*files, error.strerror]), FAILURE)
    return _fail(
        f"{type(error).__name__}: {one_line(error, _LONGEST)}; hsa-compile does not foresee "
        "this, please report it with what HSA_COMPILE_LOG=debug shows",
        FAILURE,
    )


def _with_allowed(error: click.UsageError) -> str:
    """Returns click's message; for a word that is no command or flag it adds those that are."""
    message = error.format_message()
    if error.ctx is None or isinstance(error, click.BadParameter | click.BadOptionUsage):
        return message
    command = error.ctx.command
    flags = [flag for option in command.get_params(error.ctx) for flag in option.opts if flag.startswith("--")]
    commands = list(command.commands) if isinstance(command, click.Group) else []
    return f"{message.rstrip('.')}; allowed are {', '.join([*commands, *flags])}"


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {one_line(message, _MOST)}", err=True)
    return code
