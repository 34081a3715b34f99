"""Flags that `tune` and `plan` share: what problems are asked for, and how they are searched."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from hsa_compile.autotune.options import (
    DEFAULT_SAMPLER,
    DEFAULT_TIMEOUT_S,
    DEFAULT_TRIALS,
    MAX_SEED,
    SAMPLERS,
    TOGETHER,
    TuneOptions,
)
from hsa_compile.cli.options import SHAPE_FIELDS, FiniteFloat, RestrictedOption, asked_problems
from hsa_compile.errors import InvalidArgument
from hsa_compile.problem import DISTRIBUTIONS, PICKS_ENDING, Problem
from hsa_compile.target import Target

F = TypeVar("F", bound=Callable[..., Any])


def searched_problems(target: Target, flags: Mapping[str, Any]) -> list[Problem]:
    """Returns the problems that the flags stand for: those of `--preset`, or else those of `problem_options`.

    Raises:
        InvalidArgument: the model is not known, has no memory, or decides on what is given.
        InvalidProblem: a value is out of range, or a problem is not written as `Problem.describe` writes it.
    """
    if not flags["preset"]:
        return asked_problems(target, flags)
    return preset_problems(flags["preset"], target, {name: flags[name] for name in SHAPE_FIELDS if flags[name]})


def search_options(command: F) -> F:
    """Adds the flags of a search: for which model, its budget, its sampler and its storage."""
    for add in reversed(_OPTIONS):
        command = add(command)
    return command


def tune_options(flags: Mapping[str, Any]) -> TuneOptions:
    """Returns the options that the flags stand for, storage and ledger aside.

    Raises:
        InvalidArgument: an option is out of range.
    """
    within, inputs = flags["until_within"], flags["inputs"]
    if inputs is not None and not inputs.endswith(PICKS_ENDING):
        inputs = TOGETHER.join(inputs.split(","))
    return TuneOptions(
        trials=flags["trials"],
        timeout=flags["timeout"],
        seed=flags["seed"],
        distribution=inputs,
        sampler=flags["sampler"],
        until_within=None if within is None else within / 100,
        workers=flags["workers"],
        isolate=not flags["in_process"],
    )


class Percent(click.ParamType):
    """A share between 0 and 100 %, with or without the sign."""

    name = "PCT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            percent = float(str(value).removesuffix("%"))
        except ValueError:
            percent = float("nan")
        if not 0 < percent < 100:
            self.fail(f"{value!r} is not a percentage between 0 and 100 such as 2%", param, ctx)
        return percent


_OPTIONS = (
    click.option(
        "--preset",
        cls=RestrictedOption,
        excludes=("--op", "--problem"),
        because="a model decides on its problems",
        metavar="NAME|DIR",
        help="Take what a bundled or saved model asks for, instead of --op.",
    ),
    click.option(
        "--inputs",
        metavar="NAMES|FILE",
        help=f"How the picks of the inputs fall: {', '.join(DISTRIBUTIONS)}, several of these, or a FILE that profile "
        "--record-picks wrote. By default a GPU is tuned for random,trained, and a CPU for random.",
    ),
    click.option(
        "--trials",
        type=click.IntRange(min=1),
        default=DEFAULT_TRIALS,
        show_default=True,
        help="How many candidates each search tries at most.",
    ),
    click.option(
        "--timeout",
        type=FiniteFloat(min=0, min_open=True),
        default=DEFAULT_TIMEOUT_S,
        show_default=True,
        help="How many seconds each problem and op may take.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, MAX_SEED),
        default=0,
        show_default=True,
        help="Seed of the sampler and the inputs.",
    ),
    click.option(
        "--sampler",
        type=click.Choice(SAMPLERS),
        default=DEFAULT_SAMPLER,
        show_default=True,
        help="What chooses the candidates.",
    ),
    click.option(
        "--until-within",
        type=Percent(),
        help="Stop early when the sampler's model expects no more than PCT from all that is left and the last 10 "
        "candidates bore it out; without a model, when the last 20 gained no more.",
    ),
    click.option(
        "--storage",
        help="Where trials are kept: postgresql://…, mysql://…, sqlite:///…, grpc://HOST:PORT (Optuna's proxy) or "
        "FILE.journal; a journal beside the schedules if left out.",
    ),
    click.option(
        "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="How many processes search at once."
    ),
    click.option(
        "--in-process",
        is_flag=True,
        help="Run candidates in this process: it starts sooner, but dies with one that crashes.",
    ),
)


SEARCH_NAMES = (
    "--inputs", "--trials", "--timeout", "--seed", "--sampler", "--until-within", "--storage", "--workers",
    "--in-process",
)  # fmt: skip

# Texts in a batch and tokens of a text, in a step that keeps the device busy.
_CPU_STEP, _GPU_STEP = (4, 2048), (1, 16384)


def preset_problems(name: str, target: Target, chosen: Mapping[str, Sequence[Any]]) -> list[Problem]:
    """Returns what a model asks for in training and in reading, each problem once.

    What reads is the shipped model where a preset has one: its recipe may have other chunks a token than the preset.

    Args:
        name: the name of a preset, or the directory of a saved model.
        target: the device, which decides what is not chosen: float32 on a CPU, bfloat16 on a GPU, and the size of a
            step.
        chosen: values of `batch`, `seq_len` and `dtype`; several make several steps.

    Raises:
        InvalidArgument: the model is not known, has no memory, or something else is chosen.
    """
    from hsa_compile.cli.models.argument import config_of, saved_in
    from hsa_compile.model.cost.workload import problems
    from hsa_compile.model.pretrained import read_config

    chosen = dict(chosen)
    on_cpu = target.kind == "cpu"
    batch, seq_len = _CPU_STEP if on_cpu else _GPU_STEP
    batches, lengths = chosen.pop("batch", [batch]), chosen.pop("seq_len", [seq_len])
    dtypes = chosen.pop("dtype", ["float32" if on_cpu else "bfloat16"])
    if chosen:
        flags = ", ".join(f"--{field.removeprefix('num_').replace('_', '-')}" for field in chosen)
        raise InvalidArgument(f"--preset {name} decides on {flags}; with it --batch, --seq-len and --dtype are allowed")
    config = config_of(name, None)
    trained = read_config(saved_in(name)) if saved_in(name).is_dir() else config
    found: dict[Problem, None] = {}
    for b in batches:
        for length in lengths:
            for dtype in dtypes:
                found |= dict.fromkeys(problems(config, b, length, dtype))
                found |= dict.fromkeys(problems(trained, b, length, dtype, training=False))
    if not found:
        raise InvalidArgument(
            f"--preset {name} as {config.variant} with texts of {', '.join(map(str, lengths))} tokens asks for no "
            f"kernel of ours; a variant with a memory and texts longer than a chunk, {config.chunk_size}, do"
        )
    return list(found)
