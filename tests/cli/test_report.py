"""`report`: one page that is well-formed, needs nothing else, is small, and that a browser shows without an error."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from shell import FIELDS, SHAPE, Shell, record_of

from hsa_compile.autotune.bench import bench as bench_module
from hsa_compile.autotune.evaluate import Outcome
from hsa_compile.cli.tuning.report_page import MOST_BYTES, Candidate, Search, page, verdict
from hsa_compile.comparison.peaks import Peaks
from hsa_compile.markup import Axis, escaped, html_table
from hsa_compile.problem import Problem
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "microsoft-edge")
PEAKS = Peaks(tflops=0.2, gb_s=20.0, source="made up")
TUNE = ["tune", *SHAPE, "--op", "attention", "--device", "cpu", "--trials", "6", "--timeout", "600", "--in-process"]


def parsed(text: str) -> ElementTree.Element:
    """The page by a parser that forgives nothing."""
    return ElementTree.fromstring(text.removeprefix("<!doctype html>\n"))


def search_of(number: int = 0, **changes: Any) -> Search:
    """A search that found the last of its candidates to be the fastest; the second failed."""
    problem, target = Problem(**FIELDS, batch=number + 1), Target.parse("cpu")
    schedules = list(SearchSpace.of(problem, target).schedules())[:8]
    outcomes = [
        Outcome(stage="full", times_ms=(3.0 - 0.1 * i,) * 3, default_times_ms=(3.0,) * 3) for i in range(len(schedules))
    ]
    outcomes[1] = Outcome(stage="prepare", failure="WrongResult", reason="o differs by 3 & more: <NaN>")
    found = tuple(
        Candidate(schedule=schedule, outcome=outcome, was_known=i == 2)
        for i, (schedule, outcome) in enumerate(zip(schedules, outcomes, strict=True))
    )
    record = replace(record_of("hsa_forward"), schedule=schedules[-1], verdict="it beats the default")
    fields = {"name": f"hsa_forward-{number}.1", "problem": problem, "target": target, "candidates": found,
              "record": record, "inputs": "random", "seed": 0, "versions": {"torch": "2.13"}}  # fmt: skip
    return Search(**{**fields, **changes})


def test_the_page_says_what_was_found_and_shows_every_candidate() -> None:
    search = search_of()
    text, left_out = page([search], [PEAKS])
    root = parsed(text)
    assert left_out == 0
    words = "".join(root.itertext())
    assert "HSA attention, forward" in words
    assert "The winner takes 1 ms, 2.00x as fast as the default's 2 ms. In the play-off: it beats the default" in words
    assert "7 candidates timed, 1 failed (1 WrongResult)" in words
    assert "o differs by 3 & more: <NaN>" in words
    details = root.find(".//details")
    assert details is not None
    assert len(details.findall(".//tbody/tr")) == len(search.candidates)
    assert "WrongResult" in "".join(details.itertext())
    assert {svg.findtext("title") for svg in root.iter("svg")} >= {
        "Time of each candidate against its trial",
        "Rates of the candidates below the roof of the device",
    }
    assert any(
        title.startswith("Times along the knob") for title in (svg.findtext("title") or "" for svg in root.iter("svg"))
    )


def test_the_page_needs_nothing_but_itself_and_is_light_and_dark() -> None:
    text, _ = page([search_of()], [None])
    assert not re.search(r"<script|<link|\b(src|href)=|url\(|@import|https?:", text)
    assert "prefers-color-scheme: dark" in text
    assert "The peaks of this device are not known here" in text


def test_what_a_name_holds_is_shown_and_not_run() -> None:
    evil = "<script>alert('1')</script>"
    text, _ = page([search_of(target=replace(Target.parse("cpu"), name=evil), name=evil)], [PEAKS])
    assert "<script" not in text
    assert evil in "".join(parsed(text).itertext())
    assert html_table([{evil: evil}], caption=evil).count("&lt;script&gt;alert(&#x27;1&#x27;)") == 3
    assert escaped('"') == "&quot;"


def test_a_search_that_has_not_ended_says_so() -> None:
    text = verdict(search_of(record=None))
    assert text.startswith("The search has not ended. So far the best candidate takes 2.3 ms, 1.30x as fast")


def test_with_many_searches_the_oldest_make_room() -> None:
    searches = [search_of(number) for number in range(200)]
    text, left_out = page(searches, [PEAKS] * len(searches))
    assert len(text.encode()) <= MOST_BYTES
    assert 0 < left_out < len(searches)
    shown = [section.findtext("p") or "" for section in parsed(text).iter("section")]
    assert len(shown) == len(searches) - left_out
    assert shown[-1].startswith("200 times 128 tokens")


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis.over("ms", [0.3, 23.0]), ["0", "5", "10", "15", "20"]),
        (Axis.over("ms", [0.02, 40.0], is_log=True), ["0.1", "1", "10"]),
        (Axis.over("ms", [3.0, 8.0], is_log=True), ["2", "5", "10"]),
        (Axis.of_choices("knob", ["2", "auto"]), ["2", "auto"]),
        (Axis(label="trial", low=0, high=4), ["0", "1", "2", "3", "4"]),
    ],
)
def test_an_axis_names_round_values(axis: Axis, expected: list[str]) -> None:
    assert [name for _, name in axis.ticks()] == expected
    assert all(0 <= axis.share(value) <= 1 for value, _ in axis.ticks())


@pytest.fixture
def tuned(run: Shell, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Both passes of a small problem, tuned with times that are made up."""
    monkeypatch.setattr(bench_module, "measure", lambda calls, device, rounds: [[1.0] * rounds for _ in calls])
    monkeypatch.setattr("hsa_compile.comparison.peaks.peaks_of", lambda target, dtype: PEAKS)
    assert run(*TUNE).code == 0
    return run


def test_the_command_shows_all_searches_or_those_that_are_named(tuned: Shell, tmp_path: Path) -> None:
    file = tmp_path / "new" / "report.html"
    done = tuned("report", "--device", "cpu", "--out", str(file))
    assert done.code == 0, done.err
    assert re.fullmatch(rf"{re.escape(str(file))}: 2 searches, \d+ kB\n", done.out)
    titles = [element.text for element in parsed(file.read_text()).iter("h2")]
    assert titles == ["HSA attention, forward", "HSA attention, backward"]
    assert "The default stays, at 1 ms" in file.read_text()
    unknown = tuned("report", "--device", "cpu", "--study", "banana")
    assert unknown.code == 2
    (name, _) = re.findall(r"hsa_\w+-[0-9a-f]{16}\.1", unknown.err)
    assert tuned("report", "--device", "cpu", "--study", name, "--out", str(file)).code == 0
    assert len(list(parsed(file.read_text()).iter("section"))) == 1


def test_without_a_search_nothing_is_made(run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("report", "--storage", "sqlite:///nothing.db")
    assert (done.code, done.out) == (2, "")
    assert "storage sqlite:///nothing.db does not exist; hsa-compile tune makes one; there are: none" in done.err
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_without_an_error(scheme: str, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of these browsers is here: {', '.join(BROWSERS)}")
    path, picture = tmp_path / "report.html", tmp_path / "report.png"
    path.write_text(page([search_of()], [PEAKS])[0])
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *dark,
         "--window-size=1000,1600",
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", path.as_uri()],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    image = pytest.importorskip("PIL.Image").open(picture).convert("L")
    assert image.size == (1000, 1600)
    assert (image.getpixel((2, 2)) > 128) == (scheme == "light")
    darkest, lightest = image.getextrema()
    assert lightest - darkest > 128  # there are letters on the paper
