"""Which study belongs to a search: one name for one question, with a number that grows when it is asked anew."""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import optuna
from optuna.storages import BaseStorage

from hsa_compile.problem import Problem
from hsa_compile.schedules.source_version import source_version
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions

FINISHED = "finished"  # study attribute: when its search ended


def question(problem: Problem, target: Target, *, inputs: str, seed: int) -> dict[str, Any]:
    """Everything that a search's answer depends on; the library's versions and the space's choices among it."""
    return {
        "problem": problem.to_dict(),
        "target": target.to_dict(),
        "source": source_version(problem, target),
        "space": {name: dict(knobs) for name, knobs in SearchSpace.of(problem, target).choices.items()},
        "inputs": inputs,
        "seed": seed,
        "versions": installed_versions(),
    }


def open_study(storage: BaseStorage, asked: Mapping[str, Any], *, anew: bool) -> optuna.Study:
    """The latest study of a question if its search has not ended and `anew` does not say otherwise, else a new one.

    Args:
        storage: where studies are.
        asked: what `question` gave; a new study carries it.
        anew: whether to begin again in any case.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stem = _stem(asked)
    numbers = [
        int(study.study_name.removeprefix(f"{stem}."))
        for study in storage.get_all_studies()
        if study.study_name.startswith(f"{stem}.")
    ]
    latest = max(numbers, default=0)
    if latest and not anew:
        study = optuna.load_study(study_name=f"{stem}.{latest}", storage=storage)
        if FINISHED not in study.user_attrs:
            return study
    study = optuna.create_study(
        study_name=f"{stem}.{latest + 1}", storage=storage, direction="minimize", load_if_exists=True
    )
    for name, value in asked.items():
        study.set_user_attr(name, value)
    return study


def finish_study(study: optuna.Study) -> None:
    """Marks a search as ended: the next one with the same question begins anew."""
    study.set_user_attr(FINISHED, datetime.now(timezone.utc).isoformat(timespec="seconds"))


def _stem(asked: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return f"{asked['problem']['op']}-{digest}"
