"""The key that a tuned schedule is looked up by: some fields must match, in others a near value will do."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import backend_for, source_version
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.target import Target


def _must_match(reason: str) -> Any:
    return field(metadata={"match": "exact", "reason": reason})


def _near(weight: float, reason: str) -> Any:
    return field(metadata={"match": "near", "weight": weight, "reason": reason})


def _recorded(reason: str) -> Any:
    return field(default="", compare=False, metadata={"match": "recorded", "reason": reason})


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleKey:
    """The key of a cache entry, stored in clear beside its value.

    A lookup accepts an entry only if every `exact` field is equal. Among those it takes the one at the least
    distance: the sum over the `near` fields of `weight · |log2(a / b)|` for numbers and `weight` for options that
    differ. Distance 0 is an exact hit. A `recorded` field matches anything: it is there to be read.
    """

    op: str = _must_match("other kernels have other knobs")
    kind: str = _must_match("cuda, hip and cpu have other templates")
    arch: str = _must_match("the device's architecture; on a CPU the vector extension that PyTorch uses")
    backend: str = _must_match("Triton, C++ and PyTorch kernels have other knobs")
    kernel_source: str = _must_match("what was tuned is another kernel than what would run")
    dtype: str = _must_match("it decides tile bytes and the matrix instruction")
    head_dim: int = _must_match("it decides tile bytes")
    value_dim: int = _must_match("it decides tile bytes")
    chunk_size: int = _must_match("it decides tile bytes")
    group: int = _must_match("it decides the rows of a tile for each token, and with them the dataflow")
    deterministic: bool = _must_match("it rules out whole dataflows; always false on a CPU, where none is ruled out")
    seq_len: int = _near(1.0, "longer lists a chunk; rounded up to a power of two")
    kv_len: int = _near(0.5, "more chunks, shorter lists; rounded up to a power of two")
    top_k: int = _near(1.0, "longer lists a chunk")
    batch: int = _near(0.5, "more programs; rounded up to a power of two")
    num_kv_heads: int = _near(0.5, "more programs")
    num_cores: int = _near(1.0, "how many programs run at once")
    softmax_off_by_one: bool = _near(0.25, "one more addition a row")
    per_head_weights: bool = _near(0.25, "one more load a row")
    mask_last_token: bool = _near(0.25, "one key less a chunk")
    packed: bool = _near(0.25, "one more load a chunk")
    stick_breaking: bool = _near(0.25, "other weights from the same picks")
    paged: bool = _near(0.25, "one more load a chunk")
    landmarks_per_chunk: int = _near(0.5, "so many scores for each chunk that competes")
    noise: bool = _near(0.5, "a hash and two logarithms a score")
    device: str = _near(2.0, "another product of the same architecture: other clocks, caches and bandwidths")

    driver: str = _recorded("a newer version keeps the schedule valid, though perhaps no longer the best")
    torch: str = _recorded("as for the driver")
    triton: str = _recorded("as for the driver")

    @staticmethod
    def of(
        problem: Problem,
        target: Target,
        versions: Mapping[str, str] | None = None,
        kernel_source: str | None = None,
    ) -> "ScheduleKey":
        """Returns the key that a problem is looked up by; `kernel_source` is this package's unless it is given."""
        bucket = problem.bucketed()
        return ScheduleKey(
            op=bucket.op,
            kind=target.kind,
            arch=target.arch,
            backend=backend_for(bucket, target),
            kernel_source=source_version(problem, target) if kernel_source is None else kernel_source,
            dtype=bucket.dtype,
            head_dim=bucket.head_dim,
            value_dim=bucket.value_dim,
            chunk_size=bucket.chunk_size,
            group=bucket.group,
            deterministic=bucket.deterministic and target.kind != "cpu",
            seq_len=bucket.seq_len,
            kv_len=bucket.kv_len,
            top_k=bucket.top_k,
            batch=bucket.batch,
            num_kv_heads=bucket.num_kv_heads,
            num_cores=target.num_cores,
            softmax_off_by_one=bucket.softmax_off_by_one,
            per_head_weights=bucket.per_head_weights,
            mask_last_token=bucket.mask_last_token,
            packed=bucket.packed,
            stick_breaking=bucket.fusion == "stick_breaking",
            paged=bucket.paged,
            landmarks_per_chunk=bucket.landmarks_per_chunk,
            noise=bucket.noise,
            device=target.name,
            driver=(versions or {}).get("driver", ""),
            torch=(versions or {}).get("torch", ""),
            triton=(versions or {}).get("triton", ""),
        )

    @staticmethod
    def of_record(record: TuningRecord) -> "ScheduleKey":
        """Returns the key that a record is stored under."""
        return ScheduleKey.of(record.problem, record.target, record.versions, record.kernel_source)

    def mismatches(self, other: "ScheduleKey") -> list[str]:
        """Returns the names of the `exact` fields in which two keys differ.

        The kernels' source differs with the op and with the backend, so it is left out where one of these is named.
        """
        names = [name for name in _EXACT if getattr(self, name) != getattr(other, name)]
        if "op" in names or "backend" in names:
            return [name for name in names if name != "kernel_source"]
        return names

    def distances(self, other: "ScheduleKey") -> dict[str, float]:
        """Returns, for each `near` field that differs, the distance that it adds between two keys."""
        apart = {}
        for name, weight in _NEAR.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                is_number = isinstance(mine, int) and not isinstance(mine, bool)
                apart[name] = weight * abs(math.log2(mine / theirs)) if is_number else weight
        return apart

    def distance(self, other: "ScheduleKey") -> float:
        """Returns how far apart two keys with equal `exact` fields are; 0 for the same key."""
        return sum(self.distances(other).values())


_EXACT = [spec.name for spec in fields(ScheduleKey) if spec.metadata["match"] == "exact"]
_NEAR = {spec.name: spec.metadata["weight"] for spec in fields(ScheduleKey) if spec.metadata["match"] == "near"}
