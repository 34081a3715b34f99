"""`hsa-compile eval`: accuracy by length and depth, and perplexity by context length."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hsa_compile.cli.options import DTYPE_ALIASES, Counts, RestrictedOption, given_flags, json_option, print_json
from hsa_compile.errors import InvalidArgument, MissingDependency
from hsa_compile.log import progress_bar
from hsa_compile.model.config import PERPLEXITY, PLACEMENTS, PROTOCOLS, TEACHER_FORCED
from hsa_compile.model.tasks.family import TASKS
from hsa_compile.model.tasks.haystack import TEXT
from hsa_compile.model.tasks.unseen import PACKAGES
from hsa_compile.problem import DTYPES

if TYPE_CHECKING:
    import torch

    from hsa_compile.cli.models.argument import Readers
    from hsa_compile.model.data.tokenizer import Tokenizer
    from hsa_compile.model.evaluation.harness_tasks import HarnessResults, HarnessRun
    from hsa_compile.model.evaluation.outcomes import OutcomeFile
    from hsa_compile.model.evaluation.perplexity import Texts
    from hsa_compile.model.evaluation.results import Results
    from hsa_compile.model.evaluation.settings import RetrievalSettings
    from hsa_compile.model.evaluation.subject import Subject
    from hsa_compile.model.tasks.haystack import TextHaystack
    from hsa_compile.model.transformer import HSATransformer

ALL, BOTH = "all", "both"


class Depths(click.ParamType):
    """Depths from 0 to 1 separated by commas, or one integer of 2 or more for as many, spread evenly."""

    name = "D[,D…]|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        if len(words) == 1 and words[0].isdecimal() and 2 <= int(words[0][:5]) <= 1000:
            count = int(words[0])
            return tuple(index / (count - 1) for index in range(count))
        try:
            depths = tuple(float(word) for word in words)
        except ValueError:
            depths = (-1.0,)
        if not all(0 <= depth <= 1 for depth in depths):
            self.fail(f"{value!r} is neither depths from 0 to 1, such as 0,0.5,1, nor a count of 2 to 1000", param, ctx)
        return tuple(dict.fromkeys(depths))


@click.command("eval")
@click.option("--model", "name", default="tiny", show_default=True, metavar="DIR|PRESET",
              help="The model to evaluate, saved by train; tiny is shipped trained.")  # fmt: skip
@click.option("--task", "tasks", type=click.Choice([*TASKS, PERPLEXITY, ALL]), multiple=True, metavar="TASK|all",
              show_default="all but ppl, or none with --harness", help="A task above; may be repeated.")  # fmt: skip
@click.option("--harness", metavar="TASK[,TASK…]", help="Run tasks of lm-evaluation-harness; needs the extra harness.")
@click.option("--harness-path", cls=RestrictedOption, needs="--harness",
              because="it has tasks of the harness",
              type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
              help="A folder of more tasks for --harness, as YAML files.")  # fmt: skip
@click.option(
    "--harness-limit",
    cls=RestrictedOption,
    needs="--harness",
    because="it is for tasks of the harness",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many samples each of these tasks takes; all if left out.",
)
@click.option(
    "--lengths", type=Counts(), default="4k,64k", show_default=True, help="Lengths of the texts in tokens; 4k is 4096."
)
@click.option("--depths", type=Depths(), default="0,0.25,0.5,0.75,1", show_default=True,
              help="Where the asked needle lies: from 0, the beginning of the text, to 1, before the question; or how "
              "many such places, 2 or more, are spread evenly.")  # fmt: skip
@click.option("--samples", type=click.IntRange(min=1), default=10, show_default=True,
              help="How many samples for each task, length and depth; for ppl how many texts.")  # fmt: skip
@click.option("--haystack", default=PACKAGES, show_default=True, metavar="packages|stdlib|DIR",
              help="The text of tasks that are hidden in real text; for ppl a corpus, or stdlib.")  # fmt: skip
@click.option("--min-distance", type=click.IntRange(min=0), default=0, show_default=True,
              help="More than so many tokens lie between needles and question.")  # fmt: skip
@click.option("--protocol", type=click.Choice([*PROTOCOLS, BOTH]), default=TEACHER_FORCED, show_default=True,
              help="How answers are judged.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), show_default="0, or the harness's own",
              help="Seed of the samples.")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="evaluation", show_default=True,
              help="The folder that results go to.")  # fmt: skip
@click.option("--memory", type=click.Choice(PLACEMENTS), default="device", show_default=True,
              help="Where chunk keys and values lie.")  # fmt: skip
@click.option(
    "--memory-dtype",
    type=click.Choice([*DTYPES, *DTYPE_ALIASES]),
    help="Dtype of chunk keys and values; the weights' if left out.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="How many chunks a token picks; the model's own if left out.")
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, cuda:1, …")
@click.option(
    "--dtype", type=click.Choice([*DTYPES, *DTYPE_ALIASES]), help="Dtype of the weights; as saved if left out."
)
@json_option
def evaluate(name: str, tasks: tuple[str, ...], harness: str | None, harness_path: Path | None,
             harness_limit: int | None, lengths: list[int], depths: tuple[float, ...], samples: int,
             haystack: str, min_distance: int, protocol: str, seed: int | None, out: Path, memory: str,
             memory_dtype: str | None, top_k: int | None, device: str, dtype: str | None,
             as_json: bool) -> None:  # fmt: skip
    """Evaluate a model: tasks of retrieval by length and depth, and perplexity by context length.

    Samples are kept in OUT/samples.jsonl as they are finished; the same command goes on after an interruption, and
    computes nothing twice. OUT also gets results.json, results.csv and pictures (with the extra `plots`), in the place
    of those of an evaluation before.

    \b
    Tasks (wording of our own; docs/tasks.md has the public task of each):
      s-niah            one needle, in sentences that come again and again
      s-niah-words      the same, in random words
      s-niah-text       the same, in real text
      mk-niah           one of four needles
      mk-niah-needles   one needle among other needles
      mk-niah-similar   the same, some of which differ in a letter of the name
      mv-niah           the four values of a name, in any order
      mq-niah           two of six needles
      vt                chains of variables
      cwe               the words that come again and again
      fwe               the most frequent words
      qa-1, qa-2        where somebody works; where somebody's boss works
      facts-1, -2, -3   who and what is where, from one, two or three facts
      mrcr              which of eight needles of one name
      ppl               perplexity of the last 512 tokens of held-out text
    Protocols:
      teacher-forced    arg-max at each answer token given the true ones
                        before it; all must be right
      greedy            generation token by token; the text up to the first
                        full stop must be the answer

    Real text is that of installed packages (numpy, sympy, networkx, mpmath, torch), less every file that equals or
    resembles one that the model was trained on; with --haystack, the validation split of a corpus, or other files.

    A haystack is read once for all its samples, which then cost only what they change; ramba and full read each
    sample as a whole. Perplexity is measured on documents of a validation split that are as long as the longest
    context, or, if there are too few, on the split's documents joined.

    With --harness, tasks of lm-evaluation-harness are run by its own evaluator, and no others unless --task is given
    too. --harness-path, --harness-limit, --seed and the flags of the model and the output apply to them.
    Contexts are never cut to a window: the memory has no limit. Tables are the harness's own; OUT gets harness.json.
    Data sets come from where a task's YAML file says, as a rule the network.

    Under torchrun the processes read each text together: each keeps a share of its memory, and the first one keeps
    and prints what is found.

    \b
    Examples:
      hsa-compile eval --lengths 4k,64k,1m
      hsa-compile eval --model runs/tiny/model --protocol both --out results
      hsa-compile eval --task vt --lengths 16m --samples 4 --memory-dtype bf16
      hsa-compile eval --harness lambada_openai,wikitext --harness-limit 100
      torchrun --nproc-per-node 4 -m hsa_compile eval --lengths 16m
    """
    import torch

    from hsa_compile.cli.models.argument import joined_readers, keep_freed_memory
    from hsa_compile.model.evaluation.settings import RetrievalSettings
    from hsa_compile.model.evaluation.subject import Subject

    run = _open_harness(harness, harness_path, harness_limit, seed)
    tasks = tasks or (() if run is not None else tuple(TASKS))
    chosen = (*TASKS, PERPLEXITY) if ALL in tasks else tuple(dict.fromkeys(tasks))
    settings = RetrievalSettings(
        tasks=tuple(task for task in chosen if task != PERPLEXITY),
        lengths=tuple(dict.fromkeys(lengths)),
        depths=depths,
        num_samples=samples,
        protocols=tuple(PROTOCOLS) if protocol == BOTH else (protocol,),
        seed=seed or 0,
        min_distance=min_distance,
    )
    with joined_readers(device) as readers:
        keep_freed_memory(readers.device)
        if run is not None and readers.mesh is not None:
            raise InvalidArgument(f"--harness {harness} runs in one process, and torchrun started several")
        model, tokenizer = _load(name, readers.device, dtype, top_k)
        subject = Subject(
            name=_title(name),
            model=model,
            tokenizer=tokenizer,
            memory=memory,
            memory_dtype=getattr(torch, DTYPE_ALIASES.get(memory_dtype, memory_dtype)) if memory_dtype else None,
            directory=out if memory == "disk" else None,
            mesh=readers.mesh,
        )
        _evaluate(subject, settings, readers, name, haystack, run, out, has_perplexity=PERPLEXITY in chosen,
                  as_json=as_json)  # fmt: skip


def _evaluate(
    subject: Subject, settings: RetrievalSettings, readers: Readers, name: str, haystack: str, run: HarnessRun | None,
    out: Path, *, has_perplexity: bool, as_json: bool,
) -> None:  # fmt: skip
    """Runs what is not kept yet; the first of several processes keeps and prints what all find together."""
    from hsa_compile.cli.models.argument import trained_on
    from hsa_compile.model.data.manifest import VALIDATION
    from hsa_compile.model.evaluation.outcomes import OutcomeFile
    from hsa_compile.model.evaluation.perplexity import open_texts
    from hsa_compile.model.tasks.haystack import load_haystack
    from hsa_compile.model.tasks.unseen import packages_haystack

    found = None
    if any(TASKS[task].haystack == TEXT for task in settings.tasks):
        is_unseen = haystack == PACKAGES
        found = packages_haystack(trained_on(name)) if is_unseen else load_haystack(haystack, split=VALIDATION)
    texts = open_texts(subject, haystack, settings.lengths, settings.num_samples) if has_perplexity else None
    quiet = as_json or not readers.is_first
    with OutcomeFile(out if readers.is_first else None) as outcomes:
        outcomes.known = readers.from_first(outcomes.known)
        answers = run(subject, outcomes, quiet=quiet) if run is not None else None
        has_tasks = has_perplexity or settings.tasks
        results = _run(subject, settings, found, texts, outcomes, quiet=quiet) if has_tasks else None
    if readers.is_first:
        _show(results, answers, out, as_json)


def _load(name: str, device: torch.device, dtype: str | None, top_k: int | None) -> tuple[HSATransformer, Tokenizer]:
    from hsa_compile.cli.models.argument import load_model
    from hsa_compile.model.training.feed import apply_stage

    model, tokenizer = load_model(name, None, device=device, dtype=dtype)
    if top_k is not None:
        if not model.config.has_memory:
            raise InvalidArgument(f"--top-k {top_k}: {name} is of variant {model.config.variant}, which has no memory")
        model.config = replace(model.config, top_k=top_k)
        apply_stage(model, model.config)
    return model, tokenizer


def _open_harness(words: str | None, path: Path | None, limit: int | None, seed: int | None) -> HarnessRun | None:
    if words is None:
        return None
    own = given_flags("--lengths", "--depths", "--samples", "--haystack", "--min-distance", "--protocol")
    if own and not given_flags("--task"):
        raise InvalidArgument(f"{own[0]} is for tasks of ours: beside --harness {words} it needs --task")
    from hsa_compile.model.evaluation.harness_tasks import open_harness  # it is an extra, and takes long to import

    names = [name.strip() for name in words.split(",")]
    return open_harness([name for name in names if name], path, limit=limit, seed=seed)


def _run(
    subject: Subject,
    settings: RetrievalSettings,
    haystack: TextHaystack | None,
    texts: Texts | None,
    outcomes: OutcomeFile,
    *,
    quiet: bool,
) -> Results:
    from hsa_compile.model.evaluation.cells import retrieval_cells
    from hsa_compile.model.evaluation.perplexity import perplexities, perplexity_jobs
    from hsa_compile.model.evaluation.results import Results
    from hsa_compile.model.evaluation.retrieval import retrieval_jobs
    from hsa_compile.model.evaluation.subject import run_jobs

    jobs = retrieval_jobs(subject, settings, haystack, outcomes) if settings.tasks else []
    jobs += perplexity_jobs(subject, texts, outcomes) if texts is not None else []
    total = sum(job.tokens for job in jobs)
    with progress_bar(total, hidden=quiet or not jobs, unit="tok", unit_scale=True) as bar:

        def show(label: str, tokens: int) -> None:
            bar.set_description_str(label, refresh=False)
            bar.update(tokens)

        run_jobs(subject.model, jobs, show)
    return Results(
        model=subject.name,
        settings=subject.key()
        | {"variant": subject.model.config.variant, "top_k": subject.model.config.top_k}
        | {"text": {"name": haystack.name} | haystack.origin if haystack is not None else None}
        | asdict(settings),
        cells=tuple(retrieval_cells(subject, settings, haystack, outcomes)),
        perplexities=tuple(perplexities(subject, texts, outcomes)) if texts is not None else (),
    )


def _show(results: Results | None, answers: HarnessResults | None, out: Path, as_json: bool) -> None:
    from hsa_compile.model.evaluation.results import draw

    paths: list[Path] = []
    if results is not None:
        paths += results.write(out)
        try:
            paths += draw(results, out)
        except MissingDependency as error:
            click.echo(f"no pictures: {error}", err=True)
    if answers is not None:
        paths.append(answers.write(out))
    found = [each for each in (answers, results) if each is not None]
    if as_json:
        values = found[-1].to_dict()
        print_json(values | {"harness": found[0].to_dict()} if len(found) > 1 else values)
        return
    click.echo("\n\n".join(table for each in found for table in each.tables()))
    click.echo(f"\nin {out}: {', '.join(path.name for path in paths)}")


def _title(directory: str) -> str:
    """Returns a model's name: that of its folder, or that of its run where the folder is called `model`."""
    path = Path(directory).resolve()
    return path.parent.name if path.name == "model" and path.parent.name else path.name
