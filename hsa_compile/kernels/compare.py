"""The comparison of a kernel's result with the float64 reference, and the tolerances that it must keep."""

from torch import Tensor

from hsa_compile.errors import NotFinite, WrongResult

# The largest ‖a − b‖ / ‖b‖ that a kernel's outputs and gradients may have, by the dtype of its tensors.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
# The tolerance of the weights that select_chunks gives: they come from float32 sums, whatever dtype the tensors have.
WEIGHT_TOLERANCE = 1e-5
# A pick may score this much less than the best chunk that was left out, as a share of the largest score.
SCORE_TOLERANCE = 1e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns ‖actual − expected‖ / ‖expected‖ in float64; infinite where `actual` is not finite."""
    difference = (actual.double() - expected.double()).norm()
    norm = expected.double().norm()
    error = float(difference / norm) if norm > 0 else float(difference)
    return error if error == error else float("inf")


def compare(name: str, actual: Tensor, expected: Tensor, tolerance: float, where: str) -> None:
    """Compares one result with the reference.

    Args:
        name: what the message calls the result.
        actual, expected: two tensors of one shape; the expected one is in float64.
        tolerance: the largest relative error that is allowed.
        where: which part of the problem this is, for the message.

    Raises:
        WrongResult: the shapes differ, a value is not finite, or the error is too large.
    """
    if actual.shape != expected.shape:
        raise WrongResult(f"{name} has shape {list(actual.shape)}, not {list(expected.shape)}")
    if not actual.isfinite().all():
        raise NotFinite(f"{name} has values that are not finite on {where}")
    error = relative_error(actual, expected)
    if not error <= tolerance:
        raise WrongResult(f"{name} is off by {error:.1e} (relative norm, at most {tolerance:.0e}) on {where}")
