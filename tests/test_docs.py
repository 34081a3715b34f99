"""What the documentation shows, runs: code, commands and their output, links; and the site builds without a warning."""

import doctest
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from shown_commands import check_shown_commands

import hsa_compile
from hsa_compile.cli.main import main
from hsa_compile.model.cost.info import model_info
from hsa_compile.model.pretrained import read_config
from hsa_compile.paths import CHECKPOINT_DIR

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCED = re.compile(r"^( *)```(\w+)?\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
TWO_SCREENS = 100  # lines
EMITTED = sorted(
    {
        line
        for page in [*PAGES, ROOT / "README.md"]
        for line in re.findall(r"^hsa-compile emit .*$", page.read_text(), re.MULTILINE)
        if "'slot " not in line  # the dataflow that a lesson adds; the lesson's own test emits it
    }
)
quiet = pytest.mark.filterwarnings("ignore::hsa_compile.errors.HSACompileWarning")


def blocks(*languages: str) -> list[object]:
    """Every fenced block of a language as a case of a test, by page and number."""
    return [
        pytest.param(code, id=f"{page.relative_to(DOCS)}-{number}")
        for page in PAGES
        for number, (_, language, code) in enumerate(FENCED.findall(page.read_text()), 1)
        if language in languages
    ]


@quiet
@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str) -> None:
    exec(compile(code, "<page>", "exec"), {"__name__": "__page__"})


@quiet
@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("page", [page for page in PAGES if "```pycon" in page.read_text()], ids=lambda page: page.name)
def test_a_python_session_prints_what_is_shown(page: Path) -> None:
    code = "".join(code for _, language, code in FENCED.findall(page.read_text()) if language == "pycon")
    session = doctest.DocTestParser().get_doctest(code, {}, "page", "page", 0)
    said: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=said.append)
    assert outcome.attempted > 0
    assert outcome.failed == 0, "".join(said)


@quiet
@pytest.mark.parametrize("code", blocks("console"))
def test_a_command_prints_what_is_shown(
    code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert code.startswith("$ ")
    for entry in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
        line, _, shown = entry.partition("\n")
        command, _, pattern = line.partition(" | grep -E ")
        assert _matches(shown, _output(command, pattern, monkeypatch, capsys)), line


def _output(
    command: str, pattern: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    lines = [line.rstrip() for line in (captured.out + captured.err).splitlines()]
    return [line for line in lines if re.search(shlex.split(pattern)[0], line)] if pattern else lines


def _matches(shown: str, printed: list[str]) -> bool:
    """Line by line; … stands for anything."""
    expected = [line.rstrip() for line in shown.rstrip("\n").splitlines()]
    patterns = [".*".join(map(re.escape, line.split("…"))) for line in expected]
    same = len(patterns) == len(printed) and all(map(re.fullmatch, patterns, printed))
    assert same, "\n".join(["shown:", *expected, "printed:", *printed])
    return same


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_command_and_flag_that_is_shown_exists(page: Path) -> None:
    shown = [code for _, language, code in FENCED.findall(page.read_text()) if language == "bash"]
    check_shown_commands("\n".join(shown))


@pytest.mark.parametrize("line", EMITTED)
def test_every_kernel_that_is_shown_is_emitted(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "emitted by hsa-compile" in _output(line, "", monkeypatch, capsys)[0]


def test_python_blocks_and_outputs_are_there() -> None:
    assert len(blocks("python")) >= 8
    assert len(blocks("console")) >= 8
    unchecked = {language for page in PAGES for _, language, _ in FENCED.findall(page.read_text())}
    assert unchecked <= {"python", "pycon", "console", "bash", "jinja", "diff", ""}


def test_the_share_of_the_peak_that_was_measured_is_that_of_the_committed_results() -> None:
    page = (DOCS / "scale.md").read_text()
    results = ROOT / "benchmarks" / "results"
    reading = json.loads((results / "read_16m_tiny.json").read_text())
    times = json.loads((results / "cpu_2_cores_avx512.json").read_text())["results"]
    product_ms = times["test_hsa_attention_cpu.py::test_share_of_matmul_rate[G16]"]["matmul 2048"]["median_ms"]
    info = model_info(read_config(CHECKPOINT_DIR / "tiny"), context=reading["tokens"])
    rate = info.prefill_flops * reading["tokens"] / reading["seconds"] / 1e9
    share = rate / (2 * 2048**3 / product_ms / 1e6 / 2)  # the product ran on two cores
    assert " 1 threads," in reading["machine"]
    assert f"one CPU core in {reading['seconds']:.0f} s" in page
    assert f"{rate:.0f} GFLOP/s, {share:.2f} of half the rate" in page


@pytest.mark.slow
@quiet
@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize(
    "small", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["small", "as-printed"]
)
def test_the_way_from_tuning_to_answers_runs_as_printed(
    small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    section = (DOCS / "model.md").read_text().partition("## From tuning to answers")[2]
    found = FENCED.search(section)
    assert found
    for line in found[3].splitlines():
        words = shlex.split(line, comments=True)
        if words[1] == "tune":
            words += ["--trials", "1", "--timeout", "1", "--in-process"]
        if "--minutes" in words:
            words[words.index("--minutes") + 1] = "0.001" if small else "0.1"
        if small and "--preset" in words:
            words += ["--seq-len", "256"] if words[1] == "tune" else ["--steps", "1"]
        if small and "--lengths" in words:
            words[words.index("--lengths") + 1] = "256"
            words[words.index("--samples") + 1] = "1"
            words += ["--task", "s-niah"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, line
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())["retrieval"]


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", FENCED.sub("", page.read_text())):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.is_file(), target
        assert not anchor or anchor in _anchors(other), target


def test_each_public_name_has_its_place_among_the_api_pages() -> None:
    shown = re.findall(r"^::: ([\w.]+)$", (DOCS / "api" / "kernels.md").read_text(), re.MULTILINE)
    public = [getattr(hsa_compile, name) for name in hsa_compile.__all__ if name != "HSACompileError"]
    assert {f"{thing.__module__}.{thing.__name__}" for thing in public} <= set(shown)
    assert "hsa_compile.errors" in shown


def test_each_page_is_in_the_navigation() -> None:
    navigation = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(navigation) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_each_page_ends_where_the_next_begins() -> None:
    navigation = re.findall(r"^  - (.+): (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(navigation) > 10
    for (_, page), (title, following) in pairwise(navigation):
        last = (DOCS / page).read_text().rstrip().splitlines()[-1]
        assert last.startswith(f"Next: [{title}]({following}) "), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_no_two_screens_of_a_page_lack_a_picture_and_an_example(page: Path) -> None:
    lines = page.read_text().splitlines()
    shown = [number for number, line in enumerate(lines) if line.lstrip().startswith(("```", "![", ":::"))]
    assert all(there - here <= TWO_SCREENS for here, there in pairwise([0, *shown, len(lines)]))


@pytest.mark.slow
def test_the_dataflow_of_the_lesson_is_right_when_the_page_is_followed(tmp_path: Path) -> None:
    page = (DOCS / "dataflow.md").read_text()
    found = {language: code for _, language, code in FENCED.findall(page) if language in ("jinja", "diff", "python")}
    (name,) = re.findall(r"^`(hsa_compile/.*\.jinja)`:$", page, re.MULTILINE)
    (emit,) = re.findall(r"^hsa-compile (emit .*'slot .*)$", page, re.MULTILINE)
    shutil.copytree(ROOT / "hsa_compile", tmp_path / "hsa_compile", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / name).write_text(found["jinja"])
    subprocess.run(["git", "apply", "-"], input=found["diff"], text=True, cwd=tmp_path, check=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "CXX": "none", "HSA_COMPILE_CACHE_DIR": str(tmp_path / "cache")}

    def said(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "hsa_forward, dataflow slot: emitted by hsa-compile" in said("-m", "hsa_compile", *shlex.split(emit))
    assert said("-c", found["python"]).count("right: slot block_tokens=") == 4


@quiet
@pytest.mark.slow
@pytest.mark.usefixtures("without_compiler")
def test_the_first_kernel_is_tuned_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = (DOCS / "first.md").read_text()
    lines = [line for _, language, code in FENCED.findall(code) if language == "bash" for line in code.splitlines()]
    assert [line.split()[1] for line in lines] == ["schedules", "emit", "tune", "bench"]
    for line in lines[:3]:
        words = shlex.split(line.replace("2k", "256"))
        if words[1] == "tune":
            words += ["--trials", "6", "--timeout", "5", "--in-process"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, line
    assert "hsa_forward B1 T256" in capsys.readouterr().out


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'hsa-compile[docs]'")
    pytest.importorskip("mkdocstrings", reason="pip install 'hsa-compile[docs]'")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site" / "scale" / "index.html").is_file()
