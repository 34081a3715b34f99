"""What a model says that it will ask of the cache is what it asks."""

from collections.abc import Callable

import pytest
import torch
from small_models import build, combinations, small_config

from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels import resolve as resolve_module
from hsa_compile.kernels.compile import Kernel
from hsa_compile.model.config import VARIANTS
from hsa_compile.model.cost.workload import problems
from hsa_compile.model.inference.inference import extend, new_state, prefill
from hsa_compile.model.presets import PRESETS, preset
from hsa_compile.problem import Problem
from hsa_compile.target import Target

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
MEMORIES = [variant for variant in VARIANTS if variant not in ("swa", "full")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """All problems that kernels are resolved for, in order."""
    seen: list[Problem] = []
    resolve: Callable[[Problem, Target], Kernel] = resolve_module.resolve

    def record(problem: Problem, target: Target) -> Kernel:
        seen.append(problem)
        return resolve(problem, target)

    monkeypatch.setattr(resolve_module, "_kernels", {})
    monkeypatch.setattr(resolve_module, "resolve", record)
    return seen


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(19, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("variant", "noise", "length"), combinations(VARIANTS, [True, False], [43, 10, 9, 7, 5, 3]))
def test_a_step_of_training_asks_for_these(variant: str, noise: bool, length: int, asked: list[Problem]) -> None:
    model = build(small_config(variant, selection_noise=noise, softmax_off_by_one=not noise)).train()
    model(tokens(2, length)).sum().backward()
    said = problems(model.config, 2, length)
    assert len(asked) == len(set(asked))
    assert set(asked) == set(said)
    assert len(said) == len(set(said))


@pytest.mark.parametrize(("variant", "length"), combinations(VARIANTS, [43, 7, 5, 3]))
def test_a_step_with_in_batch_memory_asks_for_these(variant: str, length: int, asked: list[Problem]) -> None:
    model = build(small_config(variant)).train()
    model.hidden(tokens(3, length), in_batch_memory=True).sum().backward()
    assert set(asked) == set(problems(model.config, 3, length, in_batch_memory=True))


@pytest.mark.parametrize("length", [5, 43])
def test_a_forward_pass_without_gradients_asks_for_these(variant: str, length: int, asked: list[Problem]) -> None:
    model = build(small_config(variant), dtype=torch.bfloat16)
    with torch.no_grad():
        model(tokens(2, length))
    said = problems(model.config, 2, length, "bfloat16", training=False)
    assert set(asked) == {problem for problem in said if not problem.decodes}


@pytest.mark.parametrize(("variant", "batch"), combinations(MEMORIES, [1, 2]))
def test_decoding_asks_for_this(variant: str, batch: int, asked: list[Problem]) -> None:
    model = build(small_config(variant))
    state = new_state(model, batch)
    text = tokens(batch, 66)
    prefill(model, text[:, :60], state)
    asked.clear()
    for token in text[:, 60:].split(1, dim=1):
        extend(model, token, state)
    said = [problem for problem in problems(model.config, batch, 66, training=False) if problem.decodes]
    assert {problem for problem in asked if problem.decodes} == set(said)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("variant", MEMORIES)
def test_every_preset_has_problems(name: str, variant: str) -> None:
    ops = [problem.op for problem in problems(preset(name, variant), 1, 4096, "bfloat16")]
    assert ops == ["hsa_forward", "hsa_backward", "select_chunks", "select_chunks_backward"]


def test_bad_values_are_named() -> None:
    for arguments, message in (((0, 8), "batch = 0"), ((1, -3), "seq_len = -3"), ((1, 8, "int8"), "dtype = 'int8'")):
        with pytest.raises(InvalidArgument, match=message):
            problems(preset("tiny"), *arguments)
