"""A warning of an op points at the line of the user's that called it, and a layer that was tuned gives none."""

import re
import warnings
from pathlib import Path
from runpy import run_path

import pytest

from hsa_compile.cli.options import OP_NAMES, expand
from hsa_compile.errors import HSACompileWarning, UntunedWarning, warn_user
from hsa_compile.kernels import resolve
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.record import Measurement, TuningRecord
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

pytestmark = pytest.mark.usefixtures("without_compiler")
LAYER = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "op.md").read_text(), re.DOTALL)[0]


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_warned", set())
    monkeypatch.setattr(resolve, "_kernels", {})


def warned_lines(file: Path) -> list[tuple[str, str]]:
    """Runs a user's file; the file and the line of each warning that this gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_path(str(file))
    return [
        (warning.filename, Path(warning.filename).read_text().splitlines()[warning.lineno - 1].strip())
        for warning in caught
        if issubclass(warning.category, UntunedWarning)
    ]


def test_the_line_is_that_of_the_call_in_the_users_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(LAYER)
    assert warned_lines(file) == [
        (str(file), "indices, weights = select_chunks("
         "query, landmarks, chunk_size=self.chunk_size, top_k=self.top_k)"),
        (str(file), "return self.o(hsa_attention("
         "q, k, v, indices, weights, chunk_size=self.chunk_size).flatten(2))"),
    ]  # fmt: skip


def test_what_tune_tunes_unasked_is_all_that_the_layer_needs(tmp_path: Path) -> None:
    target = Target.parse("cpu")
    shape = {"batch": [2], "seq_len": [256], "num_heads": [8], "num_kv_heads": [1], "head_dim": [32],
             "chunk_size": [16], "top_k": [4]}  # fmt: skip
    one = Measurement(median_ms=1.0, p20_ms=1.0, p80_ms=1.0, repeats=15)
    for problem in expand(target, shape, OP_NAMES["all"]):
        default_cache().put(
            TuningRecord(
                problem=problem, target=target, schedule=default_schedule(problem, target), measurement=one,
                default_measurement=one, trials=12, failures={}, inputs="random", fingerprint="0123456789abcdef",
                versions={}, date="2026-02-03T04:05:06+00:00",
            )
        )  # fmt: skip
    (tmp_path / "mine.py").write_text(LAYER)
    assert warned_lines(tmp_path / "mine.py") == []


def test_where_no_line_is_the_users_the_caller_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsa_compile.errors._OURS", "")  # every file is ours
    with pytest.warns(HSACompileWarning) as caught:
        warn_user("text", HSACompileWarning)
    assert caught[0].filename == __file__
