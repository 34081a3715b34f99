"""`hsa-compile report`: a study as one page that needs nothing but itself, and as pictures."""

from __future__ import annotations

import contextlib
import html
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hsa_compile.checks import shown
from hsa_compile.errors import CacheError, InvalidArgument
from hsa_compile.target import Target
from hsa_compile.versions import require

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage

LATEST = "latest"


@click.command()
@click.option("--study", "name", default=LATEST, show_default=True, help="Name of the study; a wrong one lists all.")
@click.option("--storage", "address", help="Where tune kept the trials; this device's journal if left out.")
@click.option(
    "--device", default="auto", show_default=True, help="The device whose journal is read: auto, cpu, cuda:0, …"
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default="report", show_default=True, help="Folder."
)
def report(name: str, address: str | None, device: str, out: Path) -> None:
    """Write a search (a study of Optuna) as HTML and PNG: its history, which knobs mattered, and times along each.

    `optuna-dashboard` opens the same storage, live while a search runs.

    \b
    Examples:
      hsa-compile report --out report
      hsa-compile report --study hsa_forward-0123456789abcdef.1 --storage postgresql://user@host/tuning
    """
    import optuna

    from hsa_compile.autotune.study.storage import default_storage, open_storage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    address = address or default_storage(Target.parse(device))
    if address.endswith(".journal") and not Path(address).exists():
        raise InvalidArgument(f"storage {address} does not exist; hsa-compile tune makes it")
    study = _timed_only(_load(open_storage(address), name))
    for package in ("plotly", "matplotlib", "sklearn"):  # this is asked before anything is written
        require(package, "a report")
    try:
        out.mkdir(parents=True, exist_ok=True)
        page = out / f"{study.study_name}.html"
        page.write_text(_page(study), encoding="utf-8", errors="replace")
        pictures = list(_pictures(study, out))
    except OSError as error:
        raise CacheError(f"cannot write to {out}: {error.strerror}") from error
    for path in [page, *pictures]:
        click.echo(path)


def _load(storage: BaseStorage, name: str) -> optuna.Study:
    import optuna

    names = [study.study_name for study in storage.get_all_studies()]
    if name == LATEST and names:
        name = names[-1]
    if name not in names:
        raise InvalidArgument(f"study {name!r} does not exist; there are {', '.join(names) or 'none'}")
    if not re.fullmatch(r"[\w-][\w.-]{0,200}", name):  # files are named after it
        raise InvalidArgument(f"study {shown(name)} is none of hsa-compile's, whose names have no spaces or slashes")
    return optuna.load_study(study_name=name, storage=storage)


def _timed_only(study: optuna.Study) -> optuna.Study:
    """Makes a copy in memory without the points that went straight back to the sampler."""
    import optuna
    from optuna.trial import TrialState

    from hsa_compile.autotune.study.trials import SKIPPED

    copy = optuna.create_study(study_name=study.study_name, direction="minimize")
    for key, value in study.user_attrs.items():
        copy.set_user_attr(key, value)
    for trial in study.trials:
        if trial.state.is_finished() and SKIPPED not in trial.user_attrs:
            with contextlib.suppress(ValueError):  # damaged lines of a journal leave trials that contradict themselves
                copy.add_trial(trial)
    if sum(trial.state == TrialState.COMPLETE for trial in copy.trials) < 2:
        raise InvalidArgument(f"study {study.study_name!r} has fewer than 2 timed candidates; nothing can be plotted")
    return copy


def _plots(study: optuna.Study, module: Any) -> list[tuple[str, Callable[[], Any]]]:
    """Returns what is drawn, each with a call of the module of Optuna's that draws it."""
    best = study.best_trial.params
    knobs = [name for name in best if len({trial.params.get(name) for trial in study.trials} - {None}) > 1]
    label = "time / default"
    plots: list[tuple[str, Callable[[], Any]]] = [
        ("history", lambda: module.plot_optimization_history(study, target_name=label))
    ]
    if knobs:
        plots.append(("importances", lambda: module.plot_param_importances(study, params=knobs, target_name=label)))
        plots.append(("slices", lambda: module.plot_slice(study, params=knobs, target_name=label)))
    return plots


def _page(study: optuna.Study) -> str:
    import optuna

    to_html = require("plotly.io", "a report").to_html
    script: bool = True  # the first figure brings plotly along, so that the page needs no network
    figures = []
    for _, draw in _plots(study, optuna.visualization):
        figures.append(to_html(_quietly(draw), include_plotlyjs=script, full_html=False))
        script = False
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{html.escape(study.study_name)}</title></head><body>\n"
        f"<h1>{html.escape(study.study_name)}</h1>\n{_facts(study)}\n" + "\n".join(figures) + "\n</body></html>\n"
    )


def _facts(study: optuna.Study) -> str:
    from optuna.trial import TrialState

    problem, target = (_mapping(study.user_attrs.get(name)) for name in ("problem", "target"))
    timed = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    rows = [
        ("problem", " ".join(f"{name}={value}" for name, value in problem.items())),
        ("device", str(target.get("name", ""))),
        ("candidates", f"{len(timed)} timed, {len(study.trials) - len(timed)} failed"),
        ("best", f"{study.best_value:.3f} of the default's time: {_best(study)}"),
    ]
    cells = (f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{''.join(cells)}</table>"


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _best(study: optuna.Study) -> str:
    """Returns the knobs of the best candidate, without the dataflow before the name of each."""
    return " ".join(
        str(value) if name == "dataflow" else f"{name.rpartition('.')[2]}={value}"
        for name, value in study.best_params.items()
    )


def _pictures(study: optuna.Study, out: Path) -> Sequence[Path]:
    import optuna

    require("matplotlib", "a report").use("Agg")
    from matplotlib import pyplot

    paths = []
    for name, draw in _plots(study, optuna.visualization.matplotlib):
        _quietly(draw)
        paths.append(out / f"{study.study_name}.{name}.png")
        pyplot.gcf().set_size_inches(max(8, 3 * len(pyplot.gcf().axes)), 5)
        pyplot.savefig(paths[-1], dpi=120, bbox_inches="tight")
        pyplot.close("all")
    return paths


def _quietly(draw: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these plots are experimental in Optuna, and say so each time
        return draw()
