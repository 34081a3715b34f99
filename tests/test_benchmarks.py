"""What the scripts of `benchmarks/` compute beside timing."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

_BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, _BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tunes_agree_with_one_whose_tie_set_has_their_winner() -> None:
    agreement = _script("ten_tunes").agreement
    tunes = [("a", "a"), ("b", "bac"), ("c", "c"), ("d", "d")]
    records = [SimpleNamespace(schedule=winner, tie_set=tuple(ties)) for winner, ties in tunes]
    assert agreement(records) == ("b", 3)
    assert agreement(records[2:]) == ("c", 1)


def test_the_times_that_are_told_and_drawn_are_those_of_the_committed_results() -> None:
    script, root = _script("speed_picture"), _BENCHMARKS.parent
    assert (root / "docs" / "pictures" / "speed.svg").read_text(encoding="utf-8") == script.picture()
    readme, page = ((root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/speed.md"))
    for bars in script.panels().values():
        times = [script.milliseconds(time) for _, time in bars]
        assert all(re.search(rf"\| (\*\*)?{time}(\*\*)? [(|]", readme) for time in times[:2])
        plain = page.replace(",", "")  # the tables of `bench` have no commas within numbers
        assert all(re.search(rf"\b{time.replace(',', '')}\b", plain) for time in (times[0], times[-1]))


def test_the_pictures_of_the_lessons_are_those_that_the_script_draws() -> None:
    drawn = _script("lesson_pictures").pictures()
    folder = _BENCHMARKS.parent / "docs" / "pictures"
    assert {name: (folder / name).read_text(encoding="utf-8") for name in drawn} == drawn


def test_the_tables_of_what_models_find_are_those_of_the_committed_results() -> None:
    script, page = _script("retrieval_table"), (_BENCHMARKS.parent / "docs" / "results.md").read_text(encoding="utf-8")
    for table in (script.seeds_table(), script.variants_table(4096), script.variants_table(65536)):
        assert table in page
