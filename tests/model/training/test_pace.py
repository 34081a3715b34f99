"""How long a run is said to take, from records with made-up times."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import in_group
from small_models import build, small_config
from small_runs import small_run

from hsa_compile.cli.models.train import _describe
from hsa_compile.model.cost.info import model_info
from hsa_compile.model.training.config import RunConfig
from hsa_compile.model.training.config_file import resolve
from hsa_compile.model.training.feed import stage_at
from hsa_compile.model.training.pace import LEFT_OUT, OwnTime, Pace, StepFlops, straggler
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.training.run import TrainingRun

STAGES = [
    {"share": 1, "seq_len": 64, "batch_tokens": 256, "top_k": 1},
    {"share": 3, "seq_len": 512, "batch_tokens": 1024, "top_k": 8},
]
SECONDS_A_FLOP = 1e-6


def costs(run: RunConfig) -> list[float]:
    """What each step of these stages, which have one length each, takes where time is FLOPs alone."""
    flops = [
        model_info(run.model_in(stage), context=stage.seq_len).training_flops * stage.batch_tokens
        for stage in run.stages
    ]
    return [SECONDS_A_FLOP * flops[stage_at(run, step)] for step in range(run.train.steps)]


def paced(run: RunConfig, steps: int, seconds: Callable[[int], float], probe_after: int = 0) -> Pace:
    """After so many steps, of which each takes so long."""
    now = [1000.0]
    pace = Pace(run, 1, lambda: now[0])
    for step in range(steps):
        now[0] += seconds(step)
        pace.add({"step": step + 1})
        if step + 1 == probe_after:
            now[0] += 7.0
            pace.add({"step": step + 1, "probe": True})
    return pace


def test_later_stages_count_what_they_cost() -> None:
    run = small_run(steps=40, stages=STAGES)
    seconds = costs(run)
    assert seconds[39] > 4 * seconds[0]
    pace = paced(run, 5, seconds.__getitem__)
    assert pace.seconds_left(5) == pytest.approx(sum(seconds[5:]))
    assert pace.seconds_of(5) == pytest.approx(seconds[5])
    assert pace.seconds_of(10) == pytest.approx(seconds[10])
    assert pace.seconds_left(40) == pace.seconds_of(40) == 0


def test_slow_first_steps_and_single_slow_ones_change_nothing() -> None:
    run = small_run(steps=40, stages=STAGES)
    seconds = costs(run)
    even = paced(run, 8, seconds.__getitem__)
    uneven = paced(run, 8, lambda step: seconds[step] * (50 if step < LEFT_OUT or step == 5 else 1))
    assert uneven.seconds_left(8) == pytest.approx(even.seconds_left(8))
    assert not paced(run, LEFT_OUT, lambda step: 1.0).is_known


def test_probes_that_are_to_come_take_as_long_as_the_last() -> None:
    run = small_run(steps=40, stages=STAGES, probe_every=4)
    seconds = costs(run)
    without = paced(run, 4, seconds.__getitem__)
    after_one = paced(run, 4, seconds.__getitem__, probe_after=4)
    assert after_one.seconds_left(4) - without.seconds_left(4) == pytest.approx(9 * 7.0)
    assert after_one.seconds_of(7) - after_one.seconds_of(6) == pytest.approx(7.0)
    assert after_one.steps_within(4, after_one.seconds_left(4)) == 36


def test_steps_within_a_time_are_those_that_it_is_enough_for() -> None:
    run = small_run(steps=40, stages=STAGES)
    seconds = costs(run)
    pace = paced(run, 5, seconds.__getitem__)
    for steps in (0, 3, 5, 20, 35):
        assert pace.steps_within(5, sum(seconds[5 : 5 + steps])) == steps
    assert pace.steps_within(5, 1e9) == 35
    assert pace.steps_within(5, -1.0) == 0


def test_rows_that_see_the_chunks_of_others_cost_more() -> None:
    alone, together = (
        StepFlops(small_run(stages=[{"seq_len": 64, "batch_tokens": 1024, "in_batch_memory": shared}]), 1)
        for shared in (False, True)
    )
    assert together(0, 64) > alone(0, 64)


def test_the_time_of_a_training_on_a_quiet_machine_is_foretold_from_its_first_steps() -> None:
    """Within a tenth: the log of a `tiny` on two cores with nothing beside it has a record every 25 steps."""
    run = resolve(preset_name="tiny")
    log = (Path(__file__).parent / "quiet_run.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, log) if "probe" not in record]
    first, second, last = steps[0], steps[1], steps[-1]
    each = (second["seconds"] - first["seconds"]) / (second["step"] - first["step"])
    pace = paced(run, 25, lambda step: each)
    assert pace.seconds_left(second["step"]) == pytest.approx(last["seconds"] - second["seconds"], rel=0.1)


class Ticks:
    """A clock that is so many seconds later each time that it is asked."""

    def __init__(self, tick: float) -> None:
        self.tick, self.now = tick, 0.0

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def test_own_time_is_that_of_linear_layers_and_of_waiting_for_batches() -> None:
    model = build(small_config("swa", num_experts=0)).train()
    model.checkpoint_activations = True
    own = OwnTime(model, torch.device("cpu"), clock=Ticks(2.0))
    model.hidden(torch.zeros(1, 9, dtype=torch.int64)).sum().backward()
    once = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert once < own.take() / 2 <= 2 * once  # computed again, but for what nobody needs again
    model.hidden(torch.zeros(1, 9, dtype=torch.int64))
    with own.counted():
        pass
    assert own.take() / 2 == once + 1
    with own.counted():
        pass
    assert own.take() == 0  # without linear layers, nothing is said


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([[1.0, 1.0, 2.0, 1.1]] * 9, (2, 2.0)),
        ([[1.0, 1.2, 1.1, 1.0]] * 9, None),
        ([[1.0, 2.0]] * 9, (1, 2.0)),
        ([[1.0, 2.0]] * 4, None),  # too few to tell
        ([[1.0, 1.0, 9.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]] * 3, None),  # now and then is not always
        ([[1.0]] * 9, None),
    ],
)
def test_a_process_is_named_if_it_is_slower_than_the_others(
    steps: list[list[float]], found: tuple[int, float] | None
) -> None:
    assert straggler(steps) == found


def run_with_a_slow_process(directory: Path) -> None:
    processes = Processes(rank=dist.get_rank(), world_size=3, device=torch.device("cpu"))
    run = TrainingRun(small_run(steps=8, log_every=2, save_every=0), directory, processes)
    run._own_time = OwnTime(run.model, processes.device, clock=Ticks(3.0 if processes.rank == 1 else 1.0))
    run.train()
    run.close()


@pytest.mark.slow
def test_a_run_names_its_slowest_process(tmp_path: Path) -> None:
    in_group(run_with_a_slow_process, 3, tmp_path, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    named = {record["step"]: (record["slowest_process"], record["slowest_over_median"])
             for record in records if "slowest_process" in record}  # fmt: skip
    assert named.keys() == {6, 8}  # the second step is the first that knows of a step before it
    assert all(process == 1 and 2 < ratio < 4 for process, ratio in named.values())
    assert "process 1 takes" in _describe(records[7])
