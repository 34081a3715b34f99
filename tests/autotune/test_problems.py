import pytest

from hsa_compile.cli.options import default_fields, expand
from hsa_compile.errors import InvalidProblem
from hsa_compile.problem import OPS, Problem
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import NAMED_TARGETS, Target


@pytest.mark.parametrize("name", ["cpu", *NAMED_TARGETS])
def test_without_a_choice_there_is_one_runnable_problem_for_each_op(name: str, cpu: Target) -> None:
    target = cpu if name == "cpu" else NAMED_TARGETS[name]
    problems = expand(target, {})
    assert [problem.op for problem in problems] == list(OPS)
    assert problems[0] == Problem(**default_fields(target))
    for problem in problems:
        default_schedule(problem, target)


def test_several_values_make_every_combination_with_the_ops_of_a_shape_side_by_side(cpu: Target) -> None:
    problems = expand(cpu, {"top_k": [4, 8], "dtype": ["float32", "bfloat16"]})
    assert len(problems) == 8
    assert [problem.op for problem in problems] == [*OPS] * 4
    assert {(problem.top_k, problem.dtype) for problem in problems} == {
        (4, "float32"), (4, "bfloat16"), (8, "float32"), (8, "bfloat16")
    }  # fmt: skip
    assert all(one == other.with_op(OPS[0]) for one, other in zip(problems[::2], problems[1::2], strict=True))


def test_one_op_can_be_asked_for(cpu: Target) -> None:
    assert [problem.op for problem in expand(cpu, {}, OPS[1:])] == [OPS[1]]


def test_a_combination_that_is_no_problem_is_refused(cpu: Target) -> None:
    with pytest.raises(InvalidProblem, match="num_heads = 16 must be a multiple of num_kv_heads = 3"):
        expand(cpu, {"num_kv_heads": [1, 3]})
