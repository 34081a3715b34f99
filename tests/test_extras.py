"""What only some features need: all of it is in one table, the table is true, and a missing one is one line."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import hsa_compile
from hsa_compile.errors import MissingDependency
from hsa_compile.versions import EXTRAS, install_command, require

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = Path(hsa_compile.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"lm-eval": "lm_eval"}  # where that is not the name of the package


def names_of(requirements: list[str]) -> set[str]:
    """What is imported of the packages that these lines require."""
    packages = [re.match(r"[\w-]+", line).group() for line in requirements]  # type: ignore[union-attr]
    return {IMPORTED_AS.get(package, package) for package in packages}


def imported_names() -> set[str]:
    """First parts of all that the package imports, wherever in a file."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_what_is_imported_is_a_dependency_or_in_the_table() -> None:
    known = names_of(PROJECT["dependencies"]) | set(EXTRAS) | set(sys.stdlib_module_names) | {"hsa_compile"}
    assert imported_names() - known == set()


def test_each_extra_of_the_table_brings_its_package() -> None:
    for name, extra in EXTRAS.items():
        assert name in names_of(PROJECT["optional-dependencies"][extra]), f"{name} is not in the extra {extra}"


def test_no_required_package_is_in_the_table() -> None:
    assert not names_of(PROJECT["dependencies"]) & set(EXTRAS)


def test_one_table_says_what_to_install() -> None:
    tellers = [path for path in PACKAGE.rglob("*.py") if re.search(r"pip install [^{]*hsa-compile\[", path.read_text())]
    assert tellers == [PACKAGE / "versions.py"]


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_package_is_one_line_that_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency) as caught:
        require(name, "this feature")
    assert str(caught.value) == f"this feature needs {name}: pip install 'hsa-compile[{EXTRAS[name]}]'"
    assert install_command(name) in str(caught.value)


def test_what_is_there_is_imported() -> None:
    pytest.importorskip("matplotlib")
    assert require("matplotlib", "a picture").__name__ == "matplotlib"


def test_a_package_that_is_there_and_cannot_be_imported_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('libsomething.so.2: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ImportError, match=r"libsomething\.so\.2"):
        require("wandb", "this feature")


def test_the_classifiers_name_the_versions_that_are_allowed() -> None:
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
    assert metadata.version("hsa-compile") == PROJECT["version"] == hsa_compile.__version__


def test_no_pin_stands_in_the_way_of_the_oldest_python() -> None:
    """A pin of what needs a newer one counts from that one on."""
    checked = 0
    for pin in map(Requirement, re.findall(r"^[\w-]+==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)):
        try:
            found = metadata.metadata(pin.name)
        except metadata.PackageNotFoundError:
            continue
        if pin.specifier.contains(found["Version"].partition("+")[0]):
            needed = SpecifierSet(found["Requires-Python"] or "")
            is_pinned = pin.marker is None or pin.marker.evaluate({"python_version": "3.10"})
            assert needed.contains("3.10.0") or not is_pinned, f"{pin} needs Python {needed}"
            checked += 1
    if not checked:
        pytest.skip("nothing that is pinned is installed")


def test_the_syntax_is_that_of_the_oldest_python() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        ast.parse(path.read_text(), str(path), feature_version=(3, 10))
