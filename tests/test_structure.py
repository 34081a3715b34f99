"""The house: imports go down only, names are what `__all__` says, importing is cheap."""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest

import hsa_compile

PACKAGE = Path(hsa_compile.__file__).parent
RANKS = {"cli": 4, "comparison": 3.5, "autotune": 3, "model": 3, "kernels": 2, "schedules": 1}
# What keeps the house one that a stranger finds the way in.
MOST_FILES, MOST_SMALL_FILES, MOST_IN_A_FOLDER = 210, 15, 16
DOORS = {"__init__.py", "__main__.py"}  # they re-export from, or start, what lies below them
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
_RELATIVE = [path.relative_to(PACKAGE.parent) for path in MODULES]


def room_of(parts: tuple[str, ...]) -> str:
    """The folder right below the package, or '' for the package's own files."""
    return parts[0] if parts and parts[0] in RANKS else ""


def imports_of(path: Path) -> list[str]:
    """Dotted names of our own modules that a file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.append(node.module or "")
    return [name for name in names if name.split(".")[0] == "hsa_compile"]


def _modules_of(path: Path, names: Collection[str]) -> set[str]:
    """Which of the named modules a file imports; a module that is taken from its package, and not that package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in names else str(node.module))
    return found & set(names) - {"hsa_compile"}


def test_imports_go_down_only() -> None:
    wrong = []
    for path in MODULES:
        parts = path.relative_to(PACKAGE).parts
        if len(parts) == 1 and parts[0] in DOORS:
            continue
        room = room_of(parts)
        for name in imports_of(path):
            other = room_of(tuple(name.split(".")[1:]))
            if other != room and RANKS.get(other, 0) >= RANKS.get(room, 0):
                wrong.append(f"{path} imports {name}")
    assert not wrong


def test_no_module_imports_itself_through_others_in_function_bodies_either() -> None:
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in _RELATIVE}
    graph = {name: _modules_of(PACKAGE.parent / path, names) for name, path in names.items()}
    del graph["hsa_compile"], graph["hsa_compile.__main__"]  # the doors: they lead to what lies below them
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules


def test_every_folder_has_a_rank() -> None:
    folders = {path.relative_to(PACKAGE).parts[0] for path in MODULES if len(path.relative_to(PACKAGE).parts) > 1}
    assert folders <= set(RANKS)


def test_a_file_is_a_room() -> None:
    texts = {path: path.read_text() for path in MODULES}
    assert not [path for path, text in texts.items() if len(text.splitlines()) > 400]
    small = [path for path, text in texts.items() if len(text.splitlines()) < 60 and path.name not in DOORS]
    assert len(small) <= MOST_SMALL_FILES, small
    assert len(texts) <= MOST_FILES
    folders = Counter(path.parent for path in texts)
    assert not [folder for folder, count in folders.items() if count > MOST_IN_A_FOLDER]
    assert not [path for path, text in texts.items() if text and not ast.get_docstring(ast.parse(text))]


def test_the_environment_is_read_in_one_place() -> None:
    readers = [path for path in MODULES if "os.environ" in path.read_text() or "os.getenv" in path.read_text()]
    assert readers == [PACKAGE / "paths.py"]


def test_all_is_what_is_visible() -> None:
    for name in hsa_compile.__all__:
        assert getattr(hsa_compile, name) is not None
    assert set(hsa_compile.__all__) <= set(dir(hsa_compile))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hsa_compile.nonsense  # noqa: B018


def _run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout


def test_import_loads_no_torch_and_an_op_brings_all_operators_and_the_cache_and_nothing_heavy() -> None:
    script = """
import sys, hsa_compile
print("torch" in sys.modules)
import torch
before = set(sys.modules)
from hsa_compile import hsa_attention
print(torch.cuda.is_initialized())
heavy = {"optuna", "triton", "jinja2", "click", "torch._dynamo"}
print(sorted(heavy & (set(sys.modules) - before)))
names = ("hsa_forward", "hsa_backward", "select_chunks", "select_chunks_backward", "hsa_decode")
print([name for name in names if not hasattr(torch.ops.hsa_compile, name)])
from hsa_compile.schedules import cache
print(cache._cache_of.cache_info().currsize)
"""
    assert _run(script).splitlines() == ["False", "False", "[]", "[]", "1"]
