"""`hsa-compile bench`: the ops against what one would run instead, on this device and one's own shapes."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hsa_compile.autotune.options import MAX_SEED
from hsa_compile.cli.options import (
    SHAPE_FIELDS,
    FiniteFloat,
    by_device,
    counted,
    expand,
    print_rows,
    shape_flags,
    shape_options,
)
from hsa_compile.comparison import BOTH, FAMILIES, KINDS
from hsa_compile.errors import InvalidArgument, UntunedWarning
from hsa_compile.log import progress_bar
from hsa_compile.problem import DISTRIBUTIONS, OPS, Problem
from hsa_compile.schedules.cache import tuned_for
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions, require

if TYPE_CHECKING:
    from hsa_compile.comparison.peaks import Peaks
    from hsa_compile.comparison.race import Race
    from hsa_compile.comparison.result import Comparison, Result

ALL = "all"
FAILURE, INTERRUPTED = 1, 130
_LENGTHS = {"cpu": [1024, 4096, 16384], "cuda": [4096, 16384, 65536]}

_RATE = "the rate reached, by the least that has to be computed and moved"
_LEGEND = {
    "op": "forward; both: forward and backward; select: the choice of chunks; decode: one new token",
    "shape": "how many tokens the context has; the rest of the shape is above, unless there are several",
    "contender": "what ran; ours is hsa-compile",
    "computes": "same function; dense: attention to everything; same sparsity, another function",
    "median": "the median time of a call, or why there is none",
    "p20 – p80": "the 20th and 80th percentiles of the times, in ms",
    "time / ours": "the median, over the rounds, of its time over ours: above 1 ours is faster",
    "TFLOP/s": _RATE,
    "GFLOP/s": _RATE,
    "GB/s": _RATE,
}

Entry = tuple[str, Problem]


@click.command()
@click.option("--op", "kind", type=click.Choice([*KINDS, ALL]), default=ALL, show_default=True,
              help="Time hsa_attention forward, or with backward (both); select_chunks; hsa_decode.")  # fmt: skip
@shape_options(seq_len=by_device(*(",".join(map(str, lengths)) for lengths in _LENGTHS.values())))
@click.option(
    "--inputs",
    type=click.Choice(DISTRIBUTIONS),
    default="random",
    show_default=True,
    help="How the picks of the inputs fall.",
)
@click.option("--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="Seed of the inputs.")
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, cuda:1, …")
@click.option("--against", type=click.Choice(FAMILIES), multiple=True, default=FAMILIES, show_default=True,
              help="What to compare with; may be repeated.")  # fmt: skip
@click.option("--contender", "files", multiple=True, metavar="FILE.py:FUNCTION",
              help="A function of your own that is called as the op is. May be repeated.")  # fmt: skip
@click.option("--seconds", type=FiniteFloat(min=0, min_open=True), default=260, show_default=True,
              help="How many seconds all shapes may take together.")  # fmt: skip
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="Folder for two pictures.")
def bench(kind: str, inputs: str, seed: int, device: str, against: tuple[str, ...],
          files: tuple[str, ...], seconds: float, file: Path | None, plots: Path | None,
          **shape: Any) -> None:  # fmt: skip
    """Time the ops against what one would run instead, side by side on this device.

    They run beside PyTorch's dense attention (sdpa), FlexAttention with a block mask of the same picks (flex),
    gathering what each token picked (gather; for selection dense scores and topk), and flash-linear-attention's native
    sparse attention (nsa). flex and nsa compute another function: one softmax over all chunks of a token.

    Each contender is first compared with the float64 definition of what it claims; one that is wrong gets no time, and
    the exit code is 1. The others are timed in turns, so that drift hits all alike; time / ours is the median of the
    ratios within a round. Rates count the least that has to be computed and moved: backward as 2.5 times forward, each
    tensor moved once. Our ops run on the schedules that lookup finds, so tune first.

    \b
    A contender's function is called as one of
      hsa_attention(q, k, v, chunk_indices, chunk_weights, chunk_size=…) -> o
      select_chunks(query, landmarks, chunk_size=…, top_k=…) -> indices, weights
      hsa_decode(q, k_chunks, v_chunks, chunk_indices, chunk_weights,
                 page_table=…) -> o

    \b
    Examples:
      hsa-compile bench
      hsa-compile bench --op forward --seq-len 4k,64k --against sdpa
      hsa-compile bench --op both --contender mine.py:attention --plots pictures
    """
    from hsa_compile.autotune.bench.device import check_memory
    from hsa_compile.cli.models.argument import device_of
    from hsa_compile.comparison.contender import check_length
    from hsa_compile.comparison.contenders import contenders_for, load_contender
    from hsa_compile.comparison.peaks import peaks_of
    from hsa_compile.comparison.race import Race
    from hsa_compile.comparison.result import Comparison

    place = device_of(device)
    target = Target.of(place)
    chosen = {name: values for name, values in shape.items() if name in SHAPE_FIELDS and values}
    entries = _entries(target, chosen, [*KINDS] if kind == ALL else [kind])
    for _, problem in entries:  # all are checked first, so that the last does not end the run
        check_length(problem)
        check_memory(problem, place)
    contenders = contenders_for(place, against)
    contenders += [load_contender(text, list(dict.fromkeys(kind for kind, _ in entries))) for text in files]
    _check_outputs(file, plots)
    click.echo(f"device    {_device_name(target)}", err=True)
    peaks = {dtype: peaks_of(target, dtype) for dtype in dict.fromkeys(problem.dtype for _, problem in entries)}
    race = Race(contenders, place, peaks, seconds=seconds, distribution=inputs, seed=seed)
    for line in _untuned(entries, target, chosen):
        click.echo(line, err=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntunedWarning)  # each would name a small shape that only the checks use
        results, complete = _run(race, entries, target, peaks)
    comparison = Comparison(
        device=_device_name(target),
        command=shlex.join(["hsa-compile", *sys.argv[1:]]),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=installed_versions(),
        inputs=inputs,
        peaks=peaks,
        results=_in_order(results, entries),
    )
    _show(comparison, file, plots)
    if not complete:
        click.echo("interrupted; the table holds what was finished", err=True)
        click.get_current_context().exit(INTERRUPTED)
    if any(result.bad for result in results):
        click.echo("error: a contender is wrong or failed, see above", err=True)
        click.get_current_context().exit(FAILURE)


def _run(
    race: Race, entries: Sequence[Entry], target: Target, peaks: dict[str, Peaks | None]
) -> tuple[list[Result], bool]:
    """Returns the results, and whether they are all: Ctrl-C ends the run and keeps the shapes that were finished.

    Peaks that are measured are measured again after each shape, and the best is kept.
    """
    from hsa_compile.comparison.peaks import peaks_of

    results: list[Result] = []
    with progress_bar(len(entries), bar_format="{desc:36} {bar} {n_fmt}/{total_fmt} {elapsed}") as bar:
        try:
            for found in race.run(entries, on_progress=bar.set_description_str):
                results += found
                bar.update()
                dtype = found[0].problem.dtype
                peaks[dtype] = _better(peaks[dtype], peaks_of(target, dtype))
        except KeyboardInterrupt:
            return results, False
    return results, True


def _untuned(entries: Sequence[Entry], target: Target, chosen: dict[str, list[Any]]) -> list[str]:
    """Says how many problems run on a default schedule, if some do, since our figures hang on it."""
    problems = dict.fromkeys(
        problem.with_op(op) for kind, problem in entries for op in (problem.op, *([OPS[1]] if kind == BOTH else []))
    )
    count = sum(tuned_for(problem, target) is None for problem in problems)
    if not count:
        return []
    command = f"hsa-compile tune --op every{shape_flags(_shape(target, chosen))}"
    return [f"untuned   {count} of {len(problems)} problems, which run on defaults; tune them with: {command}"]


def _better(before: Peaks | None, after: Peaks | None) -> Peaks | None:
    return before.or_better(after) if before and after else before


def _entries(target: Target, chosen: dict[str, list[Any]], kinds: Sequence[str]) -> list[Entry]:
    fields = _shape(target, chosen)
    # Several values of --heads make one problem of selection, which has only those of --kv-heads.
    return list(dict.fromkeys((kind, problem) for kind in kinds for problem in expand(target, fields, [KINDS[kind]])))


def _shape(target: Target, chosen: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"seq_len": _LENGTHS["cpu" if target.kind == "cpu" else "cuda"], **chosen}


def _in_order(results: Sequence[Result], entries: Sequence[Entry]) -> list[Result]:
    """Puts results in the order in which the shapes were asked for, rather than timed."""
    order = {entry: index for index, entry in enumerate(entries)}
    return sorted(results, key=lambda result: order[result.kind, result.problem])


def _check_outputs(file: Path | None, plots: Path | None) -> None:
    """Checks that figures and pictures can be written, before minutes are spent on them.

    Raises:
        InvalidArgument: a folder is not there or cannot be made.
        MissingDependency: pictures are asked for and matplotlib is not installed.
    """
    if file is not None and not file.parent.is_dir():
        raise InvalidArgument(f"--json {file}: there is no folder {file.parent}")
    if plots is not None:
        require("matplotlib", "a picture")
        try:
            plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgument(f"--plots {plots} cannot be made: {error.strerror}") from error


def _device_name(target: Target) -> str:
    return f"{target.name} ({target.kind} {target.arch}, {counted(target.num_cores, 'core')})"


def _show(comparison: Comparison, file: Path | None, plots: Path | None) -> None:
    from hsa_compile.comparison.result import digits, draw, notes_of, rate_unit, rows_of, shapes_of

    results = comparison.results
    click.echo("\n".join(["", *shapes_of(results), ""]))
    print_rows(rows_of(comparison), as_json=False, legend=_LEGEND, empty="nothing was timed")
    notes = notes_of(results)
    if notes:
        click.echo("\n" + "\n".join(notes))
    for dtype, peaks in comparison.peaks.items():
        if peaks:
            unit, factor = rate_unit(comparison)
            roofs = f"{digits(factor * peaks.tflops)} {unit}, {digits(peaks.gb_s)} GB/s"
            click.echo(f"\npeaks, {dtype}: {roofs} ({peaks.source})")
    if file is not None:
        comparison.write(file)
        click.echo(f"\nfigures in {file}")
    if plots is not None:
        click.echo(f"pictures in {plots}: {', '.join(path.name for path in draw(comparison, plots))}")
