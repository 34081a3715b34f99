"""Tasks of lm-evaluation-harness: found by name, run by its own evaluator, with what it found as plain values."""

import contextlib
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa_compile.errors import InvalidArgument
from hsa_compile.files import write_json
from hsa_compile.markup import escaped
from hsa_compile.model.evaluation.harness import HarnessModel
from hsa_compile.model.evaluation.outcomes import OutcomeFile
from hsa_compile.model.evaluation.subject import Subject
from hsa_compile.versions import installed_versions, missing

try:
    import lm_eval
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table
except ModuleNotFoundError as error:
    raise missing("lm_eval", "--harness") from error

HARNESS_FILE = "harness.json"
# What is left out is long, or about the repository that a command happens to run in.
_NOT_KEPT = ("pretty_env_info", "git_hash", "upper_git_hash", "samples")
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


class Tasks(TaskManager):
    """The harness's tasks; where they fail to load, they raise an error of ours.

    Args:
        directory: a directory of more tasks, as YAML files; None for none.
        with_own: whether the harness's own tasks are there too; there are so many that it takes seconds.
    """

    def __init__(self, directory: Path | None = None, *, with_own: bool = True) -> None:
        super().__init__(
            include_path=str(directory) if directory is not None else None,
            include_defaults=with_own,
        )

    def named(self, patterns: Sequence[str]) -> list[str]:
        """Returns the tasks, groups and tags that names or patterns (`mmlu_*`) stand for, each once.

        Raises:
            InvalidArgument: a name stands for none.
        """
        if not patterns:
            raise InvalidArgument("--harness names no task; `lm-eval ls tasks` lists what there is")
        names: dict[str, None] = {}
        for pattern in patterns:
            found = self.match_tasks([pattern])
            if not found:
                near = difflib.get_close_matches(pattern, self.all_tasks, n=5)
                hint = f"near it are {', '.join(near)}" if near else "`lm-eval ls tasks` lists what there is"
                raise InvalidArgument(f"--harness {pattern}: no such task; {hint}")
            names |= dict.fromkeys(found)
        return list(names)

    def load(self, task_list: Any) -> Any:
        """Loads tasks as the harness does.

        Raises:
            InvalidArgument: a task's data or code cannot be had, or it needs what is not here.
        """
        try:
            found = super().load(task_list)
        # These are what data sets, the network, a YAML file and a task's own code may raise.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
            raise InvalidArgument(f"--harness {_joined(task_list)} cannot be loaded: {error or repr(error)}") from error
        for name, task in found["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise InvalidArgument(f"--harness {name} runs code that a model wrote, which is not done here")
            if getattr(task, "MULTIMODAL", False):
                raise InvalidArgument(f"--harness {name} asks about more than text")
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HarnessRun:
    """Tasks that were found, to be run by the harness's `simple_evaluate`.

    Attributes:
        tasks: the collection in which they are.
        names: the names of the tasks.
        limit: how many samples each takes; None takes all.
        seed: the seed of the choice of examples and whatever else is drawn; None takes the harness's own, which
            published results have.
    """

    tasks: Tasks
    names: tuple[str, ...]
    limit: int | None = None
    seed: int | None = None

    def __call__(self, subject: Subject, outcomes: OutcomeFile, *, quiet: bool = False) -> "HarnessResults":
        """Runs the tasks.

        Args:
            subject: the model that answers.
            outcomes: where its answers are kept.
            quiet: whether to show no progress bar of answers.

        Raises:
            InvalidArgument: a task cannot be loaded, or is not for this model.
        """
        model = HarnessModel(subject, outcomes, seed=self.seed or 0, quiet=quiet)
        seeds: dict[str, Any] = {} if self.seed is None else dict.fromkeys(_SEEDS, self.seed)
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does
            found = simple_evaluate(
                model=model,
                tasks=list(self.names),
                task_manager=self.tasks,
                limit=self.limit,
                log_samples=False,
                **seeds,
            )
        values = json.loads(json.dumps(found, default=handle_non_serializable))
        return HarnessResults(
            model=subject.name,
            settings=subject.key()
            | {"variant": subject.model.config.variant, "top_k": subject.model.config.top_k}
            | {"tasks": list(self.names), "limit": self.limit, "seed": self.seed},
            found={name: value for name, value in values.items() if name not in _NOT_KEPT},
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HarnessResults:
    """What the harness found.

    Attributes:
        model: the model's name.
        settings: plain values: the model's key, and what was asked.
        found: plain values as the harness gives them.
    """

    model: str
    settings: dict[str, Any]
    found: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        versions = installed_versions() | {"lm-eval": lm_eval.__version__}
        return {"model": self.model, "settings": self.settings, "versions": versions, "found": self.found}

    def tables(self) -> list[str]:
        """The harness's own tables of tasks and of groups."""
        return [make_table(self.found, column).strip() for column in ("results", "groups") if column in self.found]

    def _repr_html_(self) -> str:
        """Returns the same tables, for a notebook."""
        return "".join(f"<pre>{escaped(table)}</pre>\n" for table in self.tables())

    def write(self, directory: Path) -> Path:
        """Writes `harness.json`, as a whole or not at all, and returns its path.

        Raises:
            SaveError: the file cannot be written.
        """
        path = directory / HARNESS_FILE
        write_json(path, self.to_dict())
        return path


def open_harness(
    names: Sequence[str], directory: Path | None = None, *, limit: int | None = None, seed: int | None = None
) -> HarnessRun:
    """Finds tasks, groups and tags.

    Args:
        names: names of tasks, groups and tags, or patterns such as `mmlu_*`.
        directory: a directory of more tasks, as YAML files; they go before the harness's own of the same name.
        limit, seed: as in `HarnessRun`.

    Raises:
        InvalidArgument: a name stands for nothing.
    """
    tasks = Tasks(directory, with_own=False)
    if not set(names) <= set(tasks.all_subtasks):  # single tasks, which need no others
        tasks = Tasks(directory)
    return HarnessRun(tasks=tasks, names=tuple(tasks.named(names)), limit=limit, seed=seed)


def _joined(task_list: Any) -> str:
    return ",".join(map(str, task_list)) if isinstance(task_list, list) else str(task_list)
