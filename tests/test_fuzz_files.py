"""Every file that the product reads, damaged at random: a whole answer or one line, never anything else.

To add a format, add a `Format` to `FORMATS`: its name; `make`, which has the product write a valid file into an empty
directory and returns its path; `read`, which reads that file as the product does and uses what it read; and, if the
format has checksums, `seal`, which makes them right again in the plain values (or `settle`, where they are in another
file), so that damage reaches what lies behind them. A file that is no JSON text has `parse` and `render`, too; for a
JSON value a line these are `parse_lines` and `render_lines`. A damage that fails has a number:
`damaged(form, text, number)` of `fuzz.py` makes it again.
"""

import contextlib
import gzip
import json
import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fuzz import COUNTS, Format, check_damaged, parse_lines, render_lines

from hsa_compile.autotune.evaluate import Outcome
from hsa_compile.autotune.samplers import make_sampler
from hsa_compile.autotune.samplers.point import parameters_of
from hsa_compile.autotune.session import first_schedules
from hsa_compile.autotune.study.ledger import Ledger, ProblemLedger
from hsa_compile.autotune.study.storage import open_storage, open_study, open_to_read, question
from hsa_compile.autotune.study.study import TuningStudy
from hsa_compile.autotune.sweeps import RecordedSweep, Replay, first_points
from hsa_compile.cli.schedules import entry_values
from hsa_compile.cli.tuning import report
from hsa_compile.cli.tuning.report_page import page
from hsa_compile.comparison import FORWARD
from hsa_compile.comparison.contender import SAME
from hsa_compile.comparison.peaks import Peaks
from hsa_compile.comparison.result import TIMED, Comparison, Result, rows_of
from hsa_compile.errors import InvalidArgument
from hsa_compile.problem import Problem
from hsa_compile.schedules import store
from hsa_compile.schedules.cache import ScheduleCache
from hsa_compile.schedules.exchange import export_records, import_records
from hsa_compile.schedules.explain import explain
from hsa_compile.schedules.record import Measurement, TuningRecord
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.schedules.store import checksum, journal_path
from hsa_compile.target import NAMED_TARGETS, Target
from hsa_compile.versions import installed_versions

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

CPU = Target(kind="cpu", name="Test CPU", arch="avx2", num_cores=4)
SHAPE: dict[str, Any] = {"seq_len": 4096, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "top_k": 8}
CASES = (
    (Problem(**SHAPE), CPU),
    (Problem(op="hsa_backward", **SHAPE), CPU),
    (Problem(**{**SHAPE, "dtype": "bfloat16"}), NAMED_TARGETS["sm_90"]),
    (Problem(op="hsa_decode", **{**SHAPE, "seq_len": 1, "kv_len": 4096, "paged": True}), CPU),
)
TIMED_ONCE = Measurement(median_ms=1.25, p20_ms=1.0, p80_ms=1.5, repeats=15)


def records() -> list[TuningRecord]:
    return [
        TuningRecord(
            problem=problem,
            target=target,
            schedule=default_schedule(problem, target),
            measurement=TIMED_ONCE,
            default_measurement=TIMED_ONCE,
            trials=12,
            failures={"WrongResult": 1},
            inputs="random",
            fingerprint="0123456789abcdef",
            versions=installed_versions(),
            date="2026-02-03T04:05:06+00:00",
            tie_set=(default_schedule(problem, target),),
            confidence=0.99,
            clocks_mhz={"sm": 1980, "memory": 2619} if target.kind == "cuda" else None,
        )
        for problem, target in CASES
    ]


def use_cache(cache: ScheduleCache) -> None:
    """Does what the ops and `hsa-compile schedules list`, `show` and `explain` do."""
    for problem, target in CASES:
        for asked in (problem, replace(problem, batch=3, top_k=7)):
            found = cache.lookup(asked, target)
            assert found is None or SearchSpace.of(asked, target).is_valid(found.schedule)
            assert cache.explain_miss(asked, target)
        explain(cache, problem, target)
    for number, (origin, record) in enumerate(cache.entries()):
        text = json.dumps(entry_values(number, origin, record), ensure_ascii=False, allow_nan=False)
        assert text.encode(errors="replace")
        assert f"{record.problem.describe()} {record.schedule} {record.target.name} {record.date}".isprintable()
        assert isinstance(record.outdated(installed_versions()), str)
        assert record.shortfall is None or record.trials >= 0


def seal_schedules(document: Any) -> None:
    for entry in document["entries"] if isinstance(document, dict) else document:
        if isinstance(entry, dict):
            entry["checksum"] = checksum({name: value for name, value in entry.items() if name != "checksum"})


def make_schedules(directory: Path) -> Path:
    path = directory / "device.json"
    store.write_records(path, records())
    return path


def make_schedule_journal(directory: Path) -> Path:
    """The lines beside a long file; the file itself holds the first record."""
    path = directory / "device.json"
    store.write_records(path, records()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "JOURNAL_ABOVE", 0)
        for record in records()[:2]:
            store.put_record(path, record)
    return journal_path(path)


def read_schedules(path: Path) -> None:
    use_cache(ScheduleCache(path.parent, pretuned=path.parent / "none"))


def make_exported(directory: Path) -> Path:
    export_records(directory / "exported.json", records())
    return directory / "exported.json"


def seal_exported(document: Any) -> None:
    seal_schedules(document)
    document["checksum"] = checksum({name: value for name, value in document.items() if name != "checksum"})


def read_exported(path: Path) -> None:
    own = path.parent / "own"
    shutil.rmtree(own, ignore_errors=True)
    cache = ScheduleCache(own, pretuned=path.parent / "none")
    cache.merge(import_records(path).records)
    use_cache(cache)


def outcomes() -> list[Outcome]:
    times = {"times_ms": (1.0, 1.1), "default_times_ms": (2.0, 2.1)}
    return [
        Outcome(stage="full", fingerprint="0123456789abcdef", seconds=0.5, **times),
        Outcome(stage="prepare", failure="WrongResult", reason="it is off by 2"),
        Outcome(stage="full", **times),
    ]


def make_ledger(directory: Path) -> Path:
    problem, target = CASES[0]
    ledger = ProblemLedger(
        Ledger(directory / "a.ledger.jsonl"), problem, target, "random", default_schedule(problem, target)
    )
    for schedule, outcome in zip(SearchSpace.of(problem, target).schedules(), outcomes(), strict=False):
        ledger.add(schedule, outcome)
    return directory / "a.ledger.jsonl"


def seal_ledger(document: Any) -> None:
    for line in document:
        if isinstance(line, dict):
            body = {name: value for name, value in line.items() if name != "checksum"}
            line["checksum"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())


def read_ledger(path: Path) -> None:
    problem, target = CASES[0]
    known = ProblemLedger(Ledger(path), problem, target, "random", default_schedule(problem, target)).known()
    for outcome in known.values():
        assert (outcome.ratio is None) == (outcome.median_ms is None) == bool(outcome.failure)


def _view(path: Path) -> TuningStudy:
    problem, target = CASES[0]
    storage = open_storage(str(path))
    points = [parameters_of(schedule) for schedule in SearchSpace.of(problem, target).schedules()]
    sampler = make_sampler("ours", seed=0, space_points=points)
    return TuningStudy(
        open_study(storage, question(problem, target, inputs="random", seed=0), anew=False),
        storage,
        problem,
        target,
        first=first_schedules(problem, target)[:1],
        max_trials=30,
        make_sampler=lambda number: sampler,
    )


def make_study(directory: Path) -> Path:
    path = directory / "a.journal"
    view = _view(path)
    for outcome in outcomes():
        proposal = view.propose()
        assert proposal is not None
        view.tell(proposal, outcome)
    proposal = view.propose()
    assert proposal is not None
    view.release(proposal)
    return path


def read_study(path: Path) -> None:
    """Goes on with the search, and reports it."""
    view = _view(path)
    proposal = view.propose()
    if proposal is not None:
        view.tell(proposal, outcomes()[0])
    for finished in view.finished():
        assert view.space.is_valid(finished.schedule)
    with contextlib.suppress(InvalidArgument):  # no study is left that says what it tuned
        searches, _ = report._chosen(open_to_read(str(path)), (), str(path))
        text, _ = page(searches, [None for _ in searches])
        assert text.encode()


def make_sweep(directory: Path, name: str = "sweep.json") -> Path:
    problem, target = CASES[0]
    schedules = list(SearchSpace.of(problem, target).schedules())[:12]
    results: dict[Any, float | str] = {s: "it failed" if i == 3 else 1.0 + i for i, s in enumerate(schedules)}
    RecordedSweep.of_schedules(results, problem=problem, target=target).save(directory / name)
    return directory / name


def make_kernel_tuner_cache(directory: Path) -> Path:
    keys = ("block_size_x", "vector")
    cache = {
        f"{x},{v}": {"block_size_x": x, "vector": v, "time": "InvalidConfig" if x == 128 and v == 2 else x / v}
        for x in (32, 64, 128) for v in (1, 2)
    }  # fmt: skip
    header = {"device_name": "a GPU", "tune_params_keys": keys, "tune_params": {}, "cache": cache}
    (directory / "cache.json").write_text(json.dumps(header, indent=1)[:-2])
    return directory / "cache.json"


def read_sweep(path: Path) -> None:
    sweep = RecordedSweep.load(path)
    Replay(sweep, first_points(sweep)).run("ours", 0, 4)


def parse_open_json(text: bytes) -> Any:
    return json.loads(text + b"}")


def make_figures(directory: Path) -> Path:
    result = Result(
        kind=FORWARD, problem=CASES[0][0], contender="hsa-compile", computes=SAME, status=TIMED,
        measurement=TIMED_ONCE, ratio=(1.0, 0.9, 1.1), tflops=1.5, gb_s=20.0,
    )  # fmt: skip
    Comparison(
        device="a CPU", command="hsa-compile bench", date="2026-02-03", versions=installed_versions(), inputs="random",
        peaks={"float32": Peaks(tflops=2.0, gb_s=30.0, source="measured")}, results=[result],
    ).write(directory / "bench.json")  # fmt: skip
    return directory / "bench.json"


def read_figures(path: Path) -> None:
    for row in rows_of(Comparison.read(path)):
        assert " ".join(row.values())


FORMATS = (
    Format(name="schedules of a device", make=make_schedules, read=read_schedules, seal=seal_schedules),
    Format(
        name="journal of a device's schedules", make=make_schedule_journal, seal=seal_schedules,
        read=lambda path: read_schedules(path), parse=parse_lines, render=render_lines,
    ),
    Format(
        name="schedules that ship", make=make_schedules, seal=seal_schedules,
        read=lambda path: use_cache(ScheduleCache(path.parent / "none", pretuned=path.parent)),
    ),
    Format(name="exported schedules", make=make_exported, read=read_exported, seal=seal_exported),
    Format(
        name="ledger", make=make_ledger, read=read_ledger, seal=seal_ledger, parse=parse_lines, render=render_lines
    ),
    Format(name="journal of studies", make=make_study, read=read_study, parse=parse_lines, render=render_lines),
    Format(name="sweep", make=make_sweep, read=read_sweep),
    Format(
        name="compressed sweep", make=lambda directory: make_sweep(directory, "sweep.json.gz"), read=read_sweep,
        parse=lambda text: json.loads(gzip.decompress(text)),
        render=lambda document: gzip.compress(json.dumps(document).encode(), compresslevel=1),
    ),
    Format(name="cache of Kernel Tuner", make=make_kernel_tuner_cache, read=read_sweep, parse=parse_open_json),
    Format(name="figures of bench", make=make_figures, read=read_figures),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for a disk, nor for a worker that a damaged trial speaks of."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr("hsa_compile.autotune.study.study.CHOOSING_S", 0.0)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name.replace(" ", "-"))
def test_a_damaged_file_gives_a_whole_answer_or_one_line(form: Format, count: int, tmp_path: Path) -> None:
    check_damaged(form, count, tmp_path)
