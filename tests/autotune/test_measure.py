import time
from pathlib import Path

import pytest
import torch

from hsa_compile.autotune.bench import device as device_module
from hsa_compile.autotune.bench.bench import measure, quantile, summarize
from hsa_compile.autotune.bench.device import free_bytes
from hsa_compile.errors import InvalidArgument

CPU = torch.device("cpu")


def test_pages_of_files_that_nobody_used_lately_count_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{1 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{(1 << 20) - 100}\n")
    assert free_bytes(CPU) == 100
    (tmp_path / "memory.stat").write_text("anon 7\nfile 9000\ninactive_file 8000\nactive_file 1000\n")
    assert free_bytes(CPU) == 8100


def test_calls_take_turns_in_alternating_order() -> None:
    ran: list[str] = []
    times = measure([lambda: ran.append("a"), lambda: ran.append("b"), lambda: ran.append("c")], CPU, rounds=3)
    assert "".join(ran) == "abccbaabc"
    assert [len(one) for one in times] == [3, 3, 3]


def test_times_are_milliseconds_and_belong_to_their_calls() -> None:
    quick, slow = measure([lambda: None, lambda: time.sleep(0.01)], CPU, rounds=3)
    assert all(0 <= t < 5 for t in quick)
    assert all(10 <= t < 1000 for t in slow)


def test_an_error_of_a_call_is_not_hidden() -> None:
    def broken() -> object:
        raise RuntimeError("launch failed")

    with pytest.raises(RuntimeError, match="launch failed"):
        measure([broken], CPU, rounds=1)


def test_no_calls_take_no_time() -> None:
    assert measure([], CPU, rounds=3) == []


@pytest.mark.parametrize(("q", "value"), [(0.0, 1.0), (0.2, 1.8), (0.5, 3.0), (0.8, 4.2), (1.0, 5.0)])
def test_quantiles_lie_between_the_closest_ranks(q: float, value: float) -> None:
    assert quantile([5.0, 1.0, 4.0, 2.0, 3.0], q) == pytest.approx(value)


def test_a_summary_holds_the_median_and_the_spread() -> None:
    summary = summarize([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (summary.p20_ms, summary.median_ms, summary.p80_ms) == pytest.approx((1.8, 3.0, 4.2))
    assert summary.repeats == 5


def test_one_outlier_does_not_move_the_median() -> None:
    assert summarize([1.0, 1.0, 1.0, 1.0, 500.0]).median_ms == 1.0


def test_times_that_are_no_times_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="median_ms"):
        summarize([0.0, 0.0])
