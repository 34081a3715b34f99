"""`bench`: the table, what is wrong in it, its files, and how it ends."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shell import Shell

from hsa_compile.comparison import peaks, race
from hsa_compile.comparison.race import Race
from hsa_compile.comparison.result import Result

SHAPE = [
    "--seq-len", "100,203", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--chunk-size", "16",
    "--top-k", "3", "--device", "cpu",
]  # fmt: skip
BENCH = ["bench", *SHAPE, "--seconds", "3600", "--against", "sdpa", "--against", "gather"]

CONTENDERS = """
import hsa_compile

def right(*tensors, chunk_size):
    return hsa_compile.hsa_attention_reference(*tensors, chunk_size=chunk_size)

def wrong(q, k, v, chunk_indices, chunk_weights, *, chunk_size):
    return right(q, k, v, chunk_indices, chunk_weights * 1.1, chunk_size=chunk_size)

def raises(q, k, v, chunk_indices, chunk_weights, *, chunk_size):
    raise KeyError("a bug")
"""

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_QUICK_S", 0.0)
    monkeypatch.setattr(race, "_PAUSE_S", 0.0)
    monkeypatch.setattr(race, "MAX_ROUNDS", 3)
    monkeypatch.setattr(peaks, "_PRODUCTS", ((64, 1),))
    monkeypatch.setattr(peaks, "_COPY_BYTES", 1 << 20)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(CONTENDERS)
    return str(path)


def test_every_op_is_timed_beside_what_one_would_run_instead(run: Shell, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = run(*BENCH, "--json", str(file))
    assert done.code == 0, done.err
    assert "forward, both, decode: B1 HQ4 H2 D16 C16 K3 float32" in done.out
    assert "untuned   8 of 8 problems" in done.err
    assert f"tune them with: hsa-compile tune --op every {' '.join(SHAPE[:-2])}\n" in done.err
    assert "warning" not in done.err
    assert "select: B1 H2 D16 C16 K3 float32" in done.out
    found = json.loads(file.read_text())
    timed = [(row["kind"], row["contender"]) for row in found["results"] if row["problem"]["kv_len"] > 200]
    assert timed == [
        *((kind, name) for kind in ("forward", "both") for name in ("hsa-compile", "SDPA", "gather")),
        ("select", "hsa-compile"), ("select", "matmul + topk"),
        *(("decode", name) for name in ("hsa-compile", "SDPA", "gather")),
    ]  # fmt: skip
    assert all(row["status"] == "timed" for row in found["results"])
    ours = found["results"][0]
    assert ours["ratio"] == [1, 1, 1]
    assert "hsa_forward: " in ours["note"]
    assert found["versions"]["torch"]
    assert found["peaks"]["float32"]["tflops"] > 0


def test_a_contender_of_ones_own_is_checked_timed_and_drawn(run: Shell, mine: str, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    done = run(*BENCH, "--op", "both", "--contender", f"{mine}:right", "--plots", str(pictures))
    assert done.code == 0
    assert done.out.count("mine.py:right") == 2
    assert sorted(path.name for path in pictures.iterdir()) == ["bench_roofline.png", "bench_time.png"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("wrong", "wrong: mine.py:wrong in forward 100, forward 203: o is off"), ("raises", "failed: mine.py:raises in")],
)
def test_one_that_is_wrong_or_raises_gets_no_time_and_the_exit_code_says_so(
    run: Shell, mine: str, name: str, reason: str
) -> None:
    done = run(*BENCH, "--op", "forward", "--contender", f"{mine}:{name}")
    assert done.code == 1
    rows = [line for line in done.out.splitlines() if line.startswith("forward") and f"mine.py:{name}" in line]
    assert len(rows) == 2
    assert not any(" ms" in row for row in rows)
    assert reason.rsplit(":", 1)[0] in done.out
    assert "hsa-compile" in done.out
    assert "SDPA" in done.out
    assert "error: a contender is wrong or failed" in done.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--contender", "{mine}:nothing"], "has no function 'nothing'"),
        (["--contender", "{mine}.txt:right"], "there is no file"),
        (["--contender", "{mine}:right", "--op", "select"], "none of what is timed"),
        (["--heads", "3"], "num_heads = 3 must be a multiple of num_kv_heads = 2"),
        (["--seq-len", "16"], "more than chunk_size = 16 are needed"),
        (["--op", "prefill"], "'prefill' is not one of"),
        (["--against", "everything"], "'everything' is not one of"),
        (["--seconds", "0"], "0"),
        (["--seq-len", "banana"], "'banana' is not a positive integer"),
        (["--json", "nowhere/bench.json"], "there is no folder nowhere"),
        (["--plots", "{mine}/pictures"], "cannot be made"),
        (["--device", "tpu"], "'tpu'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run: Shell, mine: str, arguments: list[str], reason: str) -> None:
    done = run(*BENCH, *(word.format(mine=mine) for word in arguments))
    assert done.code == 2
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    assert reason in done.err


def test_ctrl_c_prints_and_keeps_what_was_finished(run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one = Race.run

    def interrupted(self: Race, *arguments: Any, **options: Any) -> Iterator[list[Result]]:
        cases = one_by_one(self, *arguments, **options)
        yield next(cases)
        raise KeyboardInterrupt

    monkeypatch.setattr(Race, "run", interrupted)
    file = tmp_path / "bench.json"
    done = run(*BENCH, "--op", "forward", "--json", str(file))
    assert done.code == 130
    assert "interrupted; the table holds what was finished" in done.err
    assert {row["problem"]["kv_len"] for row in json.loads(file.read_text())["results"]} == {100}
    assert "SDPA" in done.out


@pytest.mark.exhaustive
def test_flex_attention_is_compiled_and_right_where_there_is_a_compiler(run: Shell, compiler: tuple[str, ...]) -> None:
    done = run("bench", *SHAPE, "--op", "forward", "--against", "flex", "--seconds", "36000")
    assert done.code == 0
    rows = [line for line in done.out.splitlines() if "FlexAttention" in line]
    assert len(rows) == 2
    assert all("same sparsity, another function" in row and " ms" in row for row in rows)
