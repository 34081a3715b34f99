"""Flags of a search, which `tune` and `plan` share."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hsa_compile.autotune.choices import (
    DEFAULT_SAMPLER,
    DEFAULT_TIMEOUT_S,
    DEFAULT_TRIALS,
    DISTRIBUTIONS,
    MAX_SEED,
    SAMPLERS,
)

if TYPE_CHECKING:
    from hsa_compile.autotune.options import TuneOptions

F = TypeVar("F", bound=Callable[..., Any])


def search_options(command: F) -> F:
    """Adds the flags of a search's budget, sampler and storage."""
    for add in reversed(_OPTIONS):
        command = add(command)
    return command


def tune_options(flags: Mapping[str, Any]) -> "TuneOptions":
    """The options that the flags stand for, storage and ledger aside.

    Raises:
        InvalidArgument: one is out of range.
    """
    from hsa_compile.autotune.options import TuneOptions

    within = flags["until_within"]
    return TuneOptions(
        trials=flags["trials"],
        timeout=flags["timeout"],
        seed=flags["seed"],
        distribution=flags["inputs"],
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
        "--inputs", type=click.Choice(DISTRIBUTIONS), default="random", show_default=True, help="How picks fall."
    ),
    click.option(
        "--trials", type=click.IntRange(min=1), default=DEFAULT_TRIALS, show_default=True, help="Of each study."
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=DEFAULT_TIMEOUT_S,
        show_default=True,
        help="Seconds for each problem and op.",
    ),
    click.option(
        "--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="Of sampler and inputs."
    ),
    click.option(
        "--sampler", type=click.Choice(SAMPLERS), default=DEFAULT_SAMPLER, show_default=True, help="What proposes."
    ),
    click.option(
        "--until-within",
        type=Percent(),
        help="Stop early: when the sampler's model expects no more than PCT from all that is left and the last 10 "
        "candidates bore it out; without a model, when the last 20 gained no more.",
    ),
    click.option(
        "--storage",
        help="postgresql://…, mysql://…, sqlite:///…, grpc://HOST:PORT (Optuna's proxy) or FILE.journal; a journal "
        "beside the schedules if left out.",
    ),
    click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Searches at once."),
    click.option("--in-process", is_flag=True, help="Start sooner, but die with a candidate that crashes."),
)
