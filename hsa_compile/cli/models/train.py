"""`hsa-compile train`: train a model by a recipe, in a folder from which it can go on."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from hsa_compile.cli.options import FiniteFloat
from hsa_compile.errors import InvalidArgument
from hsa_compile.log import progress_bar
from hsa_compile.model.config import VARIANTS
from hsa_compile.model.presets import PRESETS
from hsa_compile.versions import install_command

if TYPE_CHECKING:
    from hsa_compile.model.training.config import RunConfig
    from hsa_compile.model.training.pace import Pace
    from hsa_compile.model.training.processes import Processes

INTERRUPTED = 130
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"  # the postfix says how much is left
SECONDS_A_PROBLEM = 15.0  # for `--tune`
# A run can go on with its processes arranged otherwise, and with its corpus in another place: its checkpoints know the
# text by its digest.
MAY_CHANGE = ("train.context_parallel", "train.expert_parallel", "train.chunk_exchange", "data.corpus")
FIRST_STEPS = 10  # after so many steps the time that the run will take is estimated


@click.command()
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="The model and its recipe; tiny if left out.")
@click.option("--variant", type=click.Choice(VARIANTS), help="Which variant of the model to train.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder of the run.")
@click.option(
    "--config",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A config to read: TOML, or a run's config.json.",
)
@click.option("--corpus", help="The text to train on: 'stdlib', or a folder that prepare wrote.")
@click.option("--steps", type=click.IntRange(min=1), help="How many optimizer steps the whole run makes.")
@click.option("--minutes", type=FiniteFloat(min=0, min_open=True), help="Stop after so long, to a step, and save.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of weights and data.")
@click.option("--tune", is_flag=True, help="First tune schedules that the run needs and the cache lacks.")
@click.option("--resume", is_flag=True, help="Go on with the run in the folder.")
def train(overrides: tuple[str, ...], preset: str | None, variant: str | None, out: Path, file: Path | None,
          corpus: str | None, steps: int | None, minutes: float | None, seed: int | None,
          tune: bool, resume: bool) -> None:  # fmt: skip
    """Train a model.

    What no flag says comes from the preset's recipe. The resolved config is saved as OUT/config.json, records go to
    OUT/metrics.jsonl, the trained model to OUT/model. After a kill at any moment the same command with --resume goes
    on from the last checkpoint with the same losses. SIGTERM saves and exits with 0, Ctrl-C saves and exits with 130.
    Under torchrun the processes share the model (FSDP2), and as train.context_parallel and train.expert_parallel say
    also rows and experts; --resume may change how. It runs on tuned schedules where there are any; --tune makes
    those that are missing.

    \b
    Examples:
      hsa-compile train --preset tiny --out runs/tiny
      hsa-compile train --preset tiny --out runs/k4 train.lr=3e-4 model.top_k=4
      hsa-compile train --out runs/tiny --resume
      torchrun --nproc-per-node 2 -m hsa_compile train --preset small --out runs/s
    """
    from hsa_compile.model.training.pace import Pace
    from hsa_compile.model.training.processes import join_processes, leave_processes, saying_who_is_gone
    from hsa_compile.model.training.run import CONFIG_FILE

    flags = {"model.variant": variant, "data.corpus": corpus, "train.steps": steps, "train.seed": seed}
    settings = {name: value for name, value in flags.items() if value is not None}
    is_told = bool(preset or file or overrides or settings)
    config = _config(out, resume, is_told, preset, file, overrides, settings)
    processes = join_processes()
    try:
        if resume and processes.is_first and not (out / CONFIG_FILE).exists():
            click.echo(f"{out} holds no run; one begins there", err=True)
        if tune:
            _tune(config, processes)
        pace = Pace(config, max(1, processes.world_size // config.train.context_parallel), time.monotonic)
        with saying_who_is_gone(processes), _stop_signals(minutes, pace) as stop:
            _run(config, out, processes, resume, stop, pace)
            processes.wait()
    finally:
        leave_processes()


def _tune(run: RunConfig, processes: Processes) -> None:
    """Tunes what the cache has no measured schedule for and says what it did; the other processes wait."""
    from hsa_compile.autotune.options import TuneOptions
    from hsa_compile.autotune.tune import tune_missing
    from hsa_compile.model.training.run import run_problems
    from hsa_compile.schedules.cache import default_cache
    from hsa_compile.target import Target

    if processes.is_first:
        device = "cpu" if processes.device.type == "cpu" else str(processes.device)
        wanted, target = run_problems(run, processes.device, processes.world_size), Target.of(processes.device)
        missing = [problem for problem in wanted if default_cache().finished(problem, target) is None]
        click.echo(
            f"{len(wanted)} problems, {len(wanted) - len(missing)} tuned before, {len(missing)} to tune, at most "
            f"{SECONDS_A_PROBLEM:.0f} s each",
            err=True,
        )
        for problem in missing:
            record, _ = tune_missing(problem, target, TuneOptions(timeout=SECONDS_A_PROBLEM), device=device)
            kept = f"; nothing is stored: {record.shortfall}" if record.shortfall else ""
            took = f"{record.measurement.median_ms:.3g} ms, {record.speedup:.2f}x the default"
            click.echo(f"{problem.describe()}: {took}{kept}", err=True)
    processes.wait()


def _config(
    out: Path, resume: bool, is_told: bool, preset: str | None, file: Path | None, overrides: tuple[str, ...],
    settings: Mapping[str, Any],
) -> RunConfig:  # fmt: skip
    """Makes the config from the flags; a run that goes on takes the saved one, with which all flags must agree."""
    from hsa_compile.model.tasks.haystack import STDLIB
    from hsa_compile.model.training.config_file import resolve
    from hsa_compile.model.training.run import CONFIG_FILE, saved_config

    saved = saved_config(out) if resume else None
    if saved is not None and not is_told:
        return saved
    if resume and saved is None and not is_told:
        raise InvalidArgument(f"{out} holds no run to resume; give the flags that it was begun with to begin it anew")
    if saved is not None and not (preset or file):
        file = out / CONFIG_FILE
    told = resolve(preset_name=preset, file=file, overrides=overrides, settings=settings)
    if told.data.corpus not in ("", STDLIB):  # the run, and who evaluates its model, may be in another folder later
        told = replace(told, data=replace(told.data, corpus=str(Path(told.data.corpus).expanduser().absolute())))
    for name, before, now in _differences(saved.to_dict(), told.to_dict()) if saved is not None else ():
        if name in MAY_CHANGE:
            continue
        raise InvalidArgument(
            f"{out} was begun with {name} = {before!r}, not {now!r}; --resume goes on with the former"
        )
    return told


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(before, tuple) and isinstance(now, tuple) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{name}.{number}")
    elif before != now:
        yield name, before, now


class _Stop:
    """Says when the run shall end early: after a signal, or when its time is up."""

    def __init__(self, minutes: float | None, pace: Pace) -> None:
        self.signal: int | None = None
        self.minutes, self._pace = minutes, pace
        self._end = time.monotonic() + 60 * minutes if minutes else float("inf")

    def __call__(self, step: int) -> bool:
        """Says whether that step shall be the last, because no other step ends nearer to the time that was given."""
        nearest = self._pace.seconds_of(step) + self._pace.seconds_of(step + 1) / 2
        return self.signal is not None or nearest >= self.seconds_left

    @property
    def seconds_left(self) -> float:
        """Returns the seconds until the time that was given is up; infinity if none was given."""
        return self._end - time.monotonic()


@contextlib.contextmanager
def _stop_signals(minutes: float | None, pace: Pace) -> Iterator[_Stop]:
    """Makes SIGTERM and Ctrl-C end the run after its step, and a second Ctrl-C end it at once."""
    stop = _Stop(minutes, pace)

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.signal == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(config: RunConfig, out: Path, processes: Processes, resume: bool, stop: _Stop, pace: Pace) -> None:
    from hsa_compile.cli.models.argument import keep_freed_memory
    from hsa_compile.model.training.run import MODEL, TrainingRun
    from hsa_compile.model.training.step import chosen_precision

    line = _Line(config.train.steps, config.train.log_every, stop, pace, shown=processes.is_first)
    keep_freed_memory(processes.device)
    run = TrainingRun(config, out, processes, resume=resume, on_record=line.show)
    try:
        if processes.is_first and not run.has_tensorboard:
            click.echo(f"no TensorBoard files: {install_command('tensorboard')} for them", err=True)
        line.begin(run.state.step, chosen_precision(config.train.precision, processes.device))
        is_finished = run.train(lambda: stop(run.state.step))
    finally:
        line.close()
        run.close()
    if processes.is_first:
        if not is_finished:
            click.echo(
                f"stopped and saved after step {run.state.step} of {config.train.steps}; to go on: "
                f"hsa-compile train --out {out} --resume"
            )
        click.echo(f"model in {out / MODEL}, after {run.state.step} steps, {run.state.seconds:.0f} s of training")
    if not is_finished and stop.signal == signal.SIGINT:
        raise click.exceptions.Exit(INTERRUPTED)


class _Line:
    """Shows how far a run is: in a live line on a terminal, elsewhere in a line now and then."""

    def __init__(self, steps: int, every: int, stop: _Stop, pace: Pace, *, shown: bool) -> None:
        self._every, self._shown = every, shown
        self._steps, self._stop, self._pace = steps, stop, pace
        self._bar: Any = None

    def begin(self, step: int, precision: str) -> None:
        """Starts the line at a step; the ones before were made by an earlier process."""
        if self._shown:
            click.echo(f"computing in {precision}")
            self._bar = progress_bar(
                self._steps, "train", initial=step, unit="step", bar_format=BAR, leave=True
            )  # fmt: skip

    def show(self, record: Mapping[str, Any]) -> None:
        """Shows a record of a step or of a probe."""
        if not self._shown or self._bar is None:
            return
        self._pace.add(record)
        if record.get("probe"):
            text = ", ".join(f"{name} {value:.3g}" for name, value in record.items() if isinstance(value, float))
            self._bar.write(f"step {record['step']}: {text}")
            return
        step, text = record["step"], _describe(record)
        self._bar.update(step - self._bar.n)
        if self._pace.is_known:
            text += f", {_duration(self._pace.seconds_left(step))} left"
        self._bar.set_postfix_str(text, refresh=False)
        if self._bar.disable and step % self._every == 0:
            click.echo(f"step {step}/{self._steps}  {text}")
        if self._pace.num_steps == FIRST_STEPS and step < self._steps:
            self._bar.write(self._estimate(step))

    def _estimate(self, step: int) -> str:
        left, given = self._pace.seconds_left(step), self._stop.seconds_left
        rate = f"at the rate of the first {FIRST_STEPS}"
        if self._stop.minutes is None or left <= given:
            return f"the {self._steps - step:,} steps that are left will take about {_duration(left)} {rate}"
        steps = self._pace.steps_within(step, given)
        return (
            f"{self._stop.minutes:g} minutes are enough for about {FIRST_STEPS + steps:,} of "
            f"{self._steps - step + FIRST_STEPS:,} steps {rate}"
        )

    def close(self) -> None:
        """Leaves the line as it is."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    """Writes a duration as a person says it, in the unit that fits."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{int(seconds < 10 * size)}f} {unit}"
    return f"{seconds:.0f} s"


def _describe(record: Mapping[str, Any]) -> str:
    parts = [f"loss {record['loss']:.3f}"]
    if record["answer_loss"] is not None:
        parts.append(f"answers {record['answer_loss']:.3f}")
    if "retrieval_loss" in record:
        parts.append(f"retrieval {record['retrieval_loss']:.3f}")
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    if "slowest_process" in record:
        parts.append(
            f"process {record['slowest_process']} takes {record['slowest_over_median']:.2f}x as long as others"
        )
    return ", ".join(parts)
