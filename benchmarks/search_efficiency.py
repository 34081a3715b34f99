"""How soon each sampler finds a good schedule: searches replayed on recorded full sweeps, without the device.

    python benchmarks/search_efficiency.py [FILES] --samplers ours,lfbo,tpe --seeds 20 --evaluations 20 55 100 \
        --json OUT.json --plot OUT.png

Samplers are ours, Optuna's, and those of other tuners (`rivals.py`). The goal is a median of at most 1.01 of the
optimum after 55 evaluations, and a p90 of at most 1.05.

A search of a sweep of our own begins with the default schedule, as `tune` does; of others, with what the sampler likes.
Without FILES it takes `../shared/sweeps/*.json.gz` and `benchmarks/sweeps/*`, where there are any. The plot needs the
`plots` extra.
"""

import argparse
import functools
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rivals import RIVALS, Space, replay
from tabulate import tabulate

from hsa_compile.autotune.bench.bench import quantile
from hsa_compile.autotune.options import SAMPLERS
from hsa_compile.autotune.sweeps import RecordedSweep, Replay, first_points
from hsa_compile.versions import installed_versions

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_FILES = (
    *sorted((ROOT / "../shared/sweeps").glob("*.json.gz")),
    *sorted((ROOT / "benchmarks/sweeps").glob("*")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Searches:
    """All seeds of one sampler on one sweep.

    Attributes:
        curves: of each seed, the least time over the optimum after each evaluation.
        seconds: of processor time that one search took, in the median.
    """

    file: str
    sampler: str
    curves: list[list[float]]
    seconds: float

    def after(self, evaluations: int) -> tuple[float, float]:
        """Median and p90 of the seeds; of a sweep with fewer points, after all of them."""
        ends = sorted(curve[min(evaluations, len(curve)) - 1] for curve in self.curves)
        return quantile(ends, 0.5), quantile(ends, 0.9)


def search_all(files: list[Path], samplers: list[str], seeds: int, evaluations: int, processes: int) -> list[Searches]:
    """Replays every sampler on every file, seed by seed."""
    found = []
    with ProcessPoolExecutor(processes) as pool:
        for file in files:
            for sampler in samplers:
                runs = list(pool.map(functools.partial(_search, file, sampler, evaluations), range(seeds)))
                curves, seconds = [curve for curve, _ in runs], [second for _, second in runs]
                found.append(
                    Searches(
                        file=_name(file), sampler=sampler, curves=curves, seconds=round(statistics.median(seconds), 3)
                    )
                )
                median, p90 = found[-1].after(evaluations)
                print(f"{_name(file)} {sampler}: {median:.3f} ({p90:.3f}) after {evaluations}", flush=True)
    return found


def table(found: list[Searches], evaluations: list[int]) -> str:
    """A row for each file and sampler: median (p90) of time over the optimum."""
    rows = [
        [
            searches.file,
            searches.sampler,
            *("{:.3f} ({:.3f})".format(*searches.after(count)) for count in evaluations),
            searches.seconds,
        ]
        for searches in found
    ]
    return tabulate(rows, headers=["sweep", "sampler", *(f"after {count}" for count in evaluations), "s a search"])


def to_json(found: list[Searches], evaluations: list[int]) -> str:
    """The table's figures, with every seed's."""
    searches = [
        {
            "sweep": one.file,
            "sampler": one.sampler,
            "seeds": len(one.curves),
            "seconds": one.seconds,
            "after": {
                str(count): {
                    "median": round(one.after(count)[0], 4),
                    "p90": round(one.after(count)[1], 4),
                    "all": [round(curve[min(count, len(curve)) - 1], 4) for curve in one.curves],
                }
                for count in evaluations
            },
        }
        for one in found
    ]
    return json.dumps({"unit": "time / optimum", "versions": installed_versions(), "searches": searches}, indent=1)


def plot(found: list[Searches], path: Path) -> None:
    """Best so far against evaluations, one panel a sweep: median, and a band to p90."""
    from matplotlib.figure import Figure  # an extra, and only the plot needs it

    files = list(dict.fromkeys(searches.file for searches in found))
    columns = min(len(files), 3)
    rows = -(-len(files) // columns)
    figure = Figure(figsize=(5.2 * columns, 4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels[len(files) :]:
        panel.set_visible(False)
    samplers = list(dict.fromkeys(searches.sampler for searches in found))
    for file, panel in zip(files, panels, strict=False):
        for searches in (one for one in found if one.file == file):
            length = min(map(len, searches.curves))
            ends = [searches.after(count) for count in range(1, length + 1)]
            colour = f"C{samplers.index(searches.sampler)}"
            steps = range(1, length + 1)
            panel.plot(steps, [median for median, _ in ends], color=colour, label=searches.sampler)
            panel.fill_between(
                steps, [median for median, _ in ends], [p90 for _, p90 in ends], color=colour, alpha=0.12, linewidth=0
            )
        panel.set(title=file, xlabel="evaluations", ylabel="time / optimum (median, band to p90)", yscale="log")
        ticks = [1, 1.05, 1.1, 1.2, 1.5, 2, 3, 5]
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_ylim(0.99, 3)
        panel.grid(alpha=0.3)
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@functools.lru_cache(maxsize=1)
def _replay(file: Path) -> tuple[Replay, Space]:
    sweep = RecordedSweep.load(file)
    own = Replay(sweep, first_points(sweep))
    return own, Space(own.table)


def _search(file: Path, sampler: str, evaluations: int, seed: int) -> tuple[list[float], float]:
    own, space = _replay(file)
    start = time.process_time()
    if sampler in RIVALS:
        first = [index for point in own.first if (index := own.table.find(point)) is not None]
        curve = replay(RIVALS[sampler], own.sweep, space, first, seed, evaluations)
    else:
        curve = own.run(sampler, seed, evaluations)
    return [least / own.sweep.optimum for least in curve], time.process_time() - start


def _name(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".json")


def main() -> None:
    """Parses the command line, searches, prints the table, writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument(
        "--samplers",
        default="ours,lfbo,vndx,tabu_wolf,tpe,random",
        help=f"of {', '.join((*SAMPLERS, *RIVALS))}; split by commas",
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[20, 55, 100])
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    files = given.files or list(DEFAULT_FILES)
    if not files:
        parser.exit(0, "nothing to replay: neither ../shared/sweeps nor benchmarks/sweeps has a file\n")
    samplers = given.samplers.split(",")
    found = search_all(files, samplers, given.seeds, max(given.evaluations), given.processes)
    print(table(found, given.evaluations))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(to_json(found, given.evaluations) + "\n")
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
