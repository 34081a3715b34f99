from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsa_compile.errors import HSACompileError, InvalidProblem
from hsa_compile.problem import (
    ALL_OPS,
    DTYPES,
    FUSIONS,
    LANDMARKS_PER_CHUNK,
    MAX_DECODE_TOKENS,
    OPS,
    OPTIONS,
    Problem,
    next_power_of_2,
)

SHAPE: dict[str, Any] = {"seq_len": 129, "num_heads": 6, "num_kv_heads": 2, "head_dim": 48, "top_k": 3}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("op", "hsa_sideways", ", ".join(OPS)),
        ("dtype", "int8", ", ".join(DTYPES)),
        ("batch", 0, "1 …"),
        ("batch", -3, "1 …"),
        ("seq_len", 0, "1 …"),
        ("seq_len", 2**40 + 1, f"… {2**40}"),
        ("seq_len", 12.0, "an integer"),
        ("seq_len", "12", "an integer"),
        ("seq_len", True, "an integer"),
        ("kv_len", -1, "1 …"),
        ("num_heads", 0, "1 …"),
        ("num_kv_heads", 0, "1 …"),
        ("top_k", 0, "1 …"),
        ("head_dim", 0, "1 … 256"),
        ("head_dim", 257, "1 … 256"),
        ("value_dim", 257, "1 … 256"),
        ("chunk_size", 0, "1 … 1024"),
        ("chunk_size", 1025, "1 … 1024"),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value_and_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidProblem) as caught:
        Problem(**{**SHAPE, field: value})
    message = str(caught.value)
    assert field in message
    assert repr(value) in message
    assert allowed in message
    assert "\n" not in message


def test_heads_that_do_not_divide_into_groups_are_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidProblem, match="num_heads = 7 must be a multiple of num_kv_heads = 2"):
        Problem(**{**SHAPE, "num_heads": 7})


def test_a_wrong_problem_is_an_error_of_ours_and_a_value_error() -> None:
    with pytest.raises(ValueError, match="top_k") as caught:
        Problem(**{**SHAPE, "top_k": 0})
    assert isinstance(caught.value, HSACompileError)


def test_lengths_left_out_are_filled_in_so_that_equal_problems_compare_equal() -> None:
    assert Problem(**SHAPE) == Problem(**SHAPE, kv_len=129, value_dim=48)
    assert hash(Problem(**SHAPE)) == hash(Problem(**SHAPE, kv_len=129, value_dim=48))


@pytest.mark.parametrize(
    ("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1023, 1024), (1024, 1024), (1025, 2048)]
)
def test_next_power_of_2_is_the_smallest_that_is_at_least_n(n: int, power: int) -> None:
    assert next_power_of_2(n) == power


def test_bucketing_rounds_lengths_and_batch_up_and_leaves_the_rest() -> None:
    problem = Problem(**SHAPE, batch=3, kv_len=1025, chunk_size=24)
    bucket = problem.bucketed()
    assert (bucket.batch, bucket.seq_len, bucket.kv_len) == (4, 256, 2048)
    unchanged = {name for name, value in bucket.to_dict().items() if value == problem.to_dict()[name]}
    assert set(problem.to_dict()) - unchanged == {"batch", "seq_len", "kv_len"}


def test_bucketing_twice_changes_nothing() -> None:
    bucket = Problem(**SHAPE, batch=3).bucketed()
    assert bucket.bucketed() == bucket


def test_neighbouring_lengths_share_a_bucket() -> None:
    buckets = {Problem(**{**SHAPE, "seq_len": n}).bucketed() for n in (129, 200, 256)}
    assert len(buckets) == 1
    assert Problem(**{**SHAPE, "seq_len": 257}).bucketed() not in buckets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_to_dict_gives_back_the_same_problem(op: str, dtype: str) -> None:
    problem = Problem(**SHAPE, op=op, dtype=dtype, softmax_off_by_one=True, per_head_weights=True, deterministic=True)
    assert Problem(**problem.to_dict()) == problem


def test_derived_numbers_follow_from_the_shape() -> None:
    problem = Problem(**SHAPE, chunk_size=50)
    assert (problem.group, problem.num_chunks, problem.itemsize) == (3, 2, 4)
    assert Problem(**SHAPE, dtype="bfloat16").itemsize == 2
    assert Problem(**SHAPE, dtype="float64").itemsize == 8
    assert problem.with_op("hsa_backward").op == "hsa_backward"


def test_describe_names_what_differs_from_the_plain_case() -> None:
    assert Problem(**SHAPE).describe() == "hsa_forward B1 T129 HQ6 H2 D48 C64 K3 float32"
    odd = Problem(**SHAPE, kv_len=300, value_dim=32, softmax_off_by_one=True, deterministic=True)
    assert odd.describe().endswith(" S300 Dv32 softmax_off_by_one deterministic")


@given(
    op=st.sampled_from(ALL_OPS),
    sizes=st.tuples(*[st.integers(1, MAX_DECODE_TOKENS)] * 6),
    num_heads=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    fusion=st.sampled_from(FUSIONS),
    landmarks=st.sampled_from(LANDMARKS_PER_CHUNK),
    flags=st.sets(st.sampled_from((*OPTIONS, "deterministic"))),
)
def test_parse_reads_what_describe_writes(
    op: str,
    sizes: tuple[int, ...],
    num_heads: int,
    dtype: str,
    fusion: str,
    landmarks: int,
    flags: set[str],
) -> None:
    batch, seq_len, kv_len, head_dim, value_dim, top_k = sizes
    problem = Problem(
        op=op, batch=batch, seq_len=seq_len, kv_len=kv_len, num_heads=2 * num_heads, num_kv_heads=num_heads,
        head_dim=head_dim, value_dim=value_dim, chunk_size=16, top_k=top_k, dtype=dtype, fusion=fusion,
        landmarks_per_chunk=landmarks, **dict.fromkeys(flags, True),
    )  # fmt: skip
    assert Problem.parse(problem.describe()) == problem
    assert Problem.parse(" ".join(reversed(problem.describe().split()))) == problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hsa_forward B1 T8 HQ4 H1 D16 C16 K2 float32 X3", "has a word that no problem has: 'X3'"),
        ("hsa_forward B1 T8 HQ4 H1 D16 C16 K-2 float32", "has a word that no problem has: 'K-2'"),
        ("hsa_forward B1 T8 T9 HQ4 H1 D16 C16 K2 float32", "gives seq_len twice"),
        ("B1 T8 HQ4 H1 D16 C16 K2", "lacks op, dtype; one is written like"),
        ("", "lacks op, batch, seq_len, num_heads, num_kv_heads, head_dim, chunk_size, top_k, dtype"),
        ("hsa_forward B1 T8 HQ4 H3 D16 C16 K2 float32", "num_heads = 4 must be a multiple of num_kv_heads = 3"),
    ],
)
def test_a_text_that_is_no_problem_is_refused_with_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InvalidProblem) as caught:
        Problem.parse(text)
    assert message in str(caught.value)
