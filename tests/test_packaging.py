"""The wheel, installed into an environment of its own, works from any folder and holds what it needs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import hsa_compile

ROOT = Path(__file__).parents[1]
PACKAGE = Path(hsa_compile.__file__).parent
DATA = {".jinja", ".toml", ".json", ".jsonl", ".safetensors", ".md", ".typed"}
BUILD = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
SHAPE = ["--seq-len=128", "--heads=4", "--kv-heads=1", "--head-dim=16", "--chunk-size=16", "--top-k=2"]
NEEDLE = "The grass is green. abc=1234. The sky is blue. The sun is yellow. Here we go. There and back again. ?abc="

Run = Callable[..., str]
pytestmark = pytest.mark.slow


def checked(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def built(kind: str, source: Path, out: Path) -> Path:
    """The wheel or sdist of a source tree, by what pip itself calls, with the setuptools that is here."""
    out.mkdir()
    checked([sys.executable, "-W", "ignore", "-c", BUILD, f"build_{kind}", str(out)], source)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, so that nothing else gets into what is built."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    copy = tmp_path_factory.mktemp("source")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", source, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python of a new environment that has the wheel, in a folder full of traps.

    The dependencies are those of this environment, by one line of a .pth file. Such a line adds a folder and does not
    read the .pth files in it, one of which may be that of this very checkout.
    """
    base = tmp_path_factory.mktemp("elsewhere")
    checked([sys.executable, "-m", "venv", "--without-pip", "env"], base)
    python = base / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    checked([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], base)
    (packages,) = (base / "env" / "lib").glob("python*/site-packages")
    here = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (packages / "dependencies.pth").write_text("\n".join(here) + "\n")
    folder = base / "folder"
    for trap in ("kernels", "model", "cli"):
        (folder / trap).mkdir(parents=True)
        (folder / trap / "__init__.py").write_text(f"raise ImportError('{trap} of the folder was imported')\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON"))}
    kept |= {"HSA_COMPILE_CACHE_DIR": str(base / "cache"), "OMP_NUM_THREADS": "1", "CXX": "there-is-none"}
    return lambda *words: checked([str(python), *words], folder, kept)


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path, source: Path) -> None:
    names = files_of(wheel)
    tracked = [path.relative_to(source) for path in (source / "hsa_compile").rglob("*") if path.is_file()]
    assert names == {str(path) for path in tracked}
    assert {Path(name).suffix for name in names} == DATA | {".py"}
    for name in (
        "py.typed",
        "schedules/regret.json",
        "model/recipes/tiny.toml",
        "model/checkpoints/tiny/model.safetensors",
        "kernels/templates/triton/hsa_forward/chunk.py.jinja",
    ):
        assert f"hsa_compile/{name}" in names


def test_the_dockerfile_copies_all_that_the_wheel_is_built_from(wheel: Path, source: Path, tmp_path: Path) -> None:
    """The copies come from what `.dockerignore` lets into the build, and give the same wheel."""
    let_in = {line[1:] for line in (source / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [line.split()[1:] for line in (source / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    context = tmp_path / "context"
    context.mkdir()
    for *names, _target in copies:
        assert let_in.issuperset(names)
        for name in names:
            (shutil.copytree if (source / name).is_dir() else shutil.copy2)(source / name, context / name)
    assert files_of(built("wheel", context, tmp_path / "dist")) == files_of(wheel)


def test_the_wheel_carries_the_licence_that_its_metadata_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        assert b"\nLicense-Expression: Apache-2.0\n" in archive.read(metadata)


def test_the_citation_names_the_version_and_the_licence_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{citation["version"]}"\n' in project
    assert f'\nlicense = "{citation["license"]}"\n' in project
    assert citation["cff-version"] == "1.2.0"
    assert all(reference["authors"] and reference["doi"] for reference in citation["references"])


def test_the_sdist_builds_the_same_wheel(wheel: Path, source: Path, tmp_path: Path) -> None:
    sdist = built("sdist", source, tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        # Python 3.11.3 and older know no filters.
        archive.extractall(tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not any((unpacked / name).exists() for name in ("tests", "benchmarks"))
    again = built("wheel", unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert {name: one.read(name) for name in one.namelist()} == {
            name: other.read(name) for name in other.namelist()
        }


def test_the_new_environment_holds_the_wheel_and_not_this_checkout(elsewhere: Run) -> None:
    out = elsewhere("-c", "import sys, hsa_compile; print(hsa_compile.__file__, sys.prefix, *sys.path, sep='\\n')")
    place, prefix, *path = out.splitlines()
    assert place.startswith(f"{prefix}{os.sep}")
    assert str(ROOT) not in path
    assert sys.prefix != prefix


def test_it_tunes(elsewhere: Run) -> None:
    words = ["tune", "--device", "cpu", *SHAPE, "--trials", "2", "--op", "forward", "--in-process", "--json"]
    (record,) = json.loads(elsewhere("-m", "hsa_compile", *words))
    assert record["trials"] == 2


@pytest.mark.exhaustive
def test_it_is_compared(elsewhere: Run) -> None:
    words = ["bench", "--device", "cpu", *SHAPE, "--op", "forward", "--against", "gather", "--seconds", "2"]
    shown = elsewhere("-W", "ignore", "-m", "hsa_compile", *words)
    assert {"ours", "gather"} <= set(shown.split())


@pytest.mark.exhaustive
def test_it_evaluates_the_model_that_is_shipped(elsewhere: Run) -> None:
    words = ["eval", "--lengths", "4k", "--samples", "1", "--depths", "0.5", "--out", "evaluation", "--json"]
    results = json.loads(elsewhere("-W", "ignore", "-m", "hsa_compile", *words))
    assert results["retrieval"]


@pytest.mark.exhaustive
def test_it_answers(elsewhere: Run) -> None:
    words = ["generate", "--model", "tiny", "--prompt", NEEDLE, "--max-new-tokens", "4"]
    assert elsewhere("-W", "ignore", "-m", "hsa_compile", *words) == "1234\n"


def test_the_command_itself_runs_from_the_folder_of_traps(elsewhere: Run) -> None:
    script = (
        "import subprocess, sys; from pathlib import Path; "
        "subprocess.run([Path(sys.prefix, 'bin', 'hsa-compile'), '--version'], check=True)"
    )
    assert elsewhere("-c", script).startswith(f"hsa-compile, version {hsa_compile.__version__}\n")
