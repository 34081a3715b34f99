"""A problem: what a kernel is asked to compute, which is one op on one shape and dtype.

Letters used all over the project: `B` batch, `T` query length, `S` key length, `HQ` query heads, `H` key/value
heads, `G = HQ // H` group size, `D` head dim, `Dv` value dim, `C` chunk size, `N = S // C` chunks, `R` landmarks of
a chunk, `K` selected chunks, `E` experts, `V` vocabulary.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from hsa_compile.checks import check_choice, check_count, check_flag
from hsa_compile.errors import InvalidProblem

OPS = ("hsa_forward", "hsa_backward")  # the ops behind hsa_attention
SELECT_OPS = ("select_chunks", "select_chunks_backward")
DECODE_OPS = ("hsa_decode",)
ALL_OPS = (*OPS, *SELECT_OPS, *DECODE_OPS)
# The families of ops, by the names that `hsa-compile tune --op` takes.
FAMILIES = {"attention": OPS, "select": SELECT_OPS, "decode": DECODE_OPS}
_TITLES = {
    "hsa_forward": "HSA attention, forward",
    "hsa_backward": "HSA attention, backward",
    "select_chunks": "Selection of chunks",
    "select_chunks_backward": "Selection of chunks, backward",
    "hsa_decode": "HSA decoding",
}
FUSIONS = ("softmax", "stick_breaking")
# The flags of a problem that change the emitted source.
OPTIONS = ("softmax_off_by_one", "per_head_weights", "mask_last_token", "packed", "noise", "paged")
DISTRIBUTIONS = ("random", "local", "hot", "trained")  # how the picks of inputs may fall
PICKS_ENDING = ".safetensors"  # a file with recorded picks may stand in their place
DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_HEAD_DIM = 256
MAX_RETRIEVAL_DIM = 1024  # the largest head dim in select_chunks
MAX_SELECTED = 128  # the most chunks that select_chunks keeps for a token
LANDMARKS_PER_CHUNK = (1, 2, 4, 8, 16)  # how many landmarks a chunk may have in select_chunks
MAX_CHUNK_SIZE = 1024
MAX_DECODE_TOKENS = 16  # the most tokens in one call of hsa_decode
_SHAPE = {
    "B": "batch", "T": "seq_len", "HQ": "num_heads", "H": "num_kv_heads", "D": "head_dim", "C": "chunk_size",
    "K": "top_k",
}  # fmt: skip
_LETTERS = {**_SHAPE, "S": "kv_len", "Dv": "value_dim", "R": "landmarks_per_chunk"}
_WORDS: dict[str, tuple[str, Any]] = {
    word: (name, word) for name, words in (("op", ALL_OPS), ("dtype", DTYPES), ("fusion", FUSIONS)) for word in words
} | {flag: (flag, True) for flag in (*OPTIONS, "deterministic")}
_FORM = "one is written like 'hsa_forward B1 T4096 HQ16 H1 D64 C64 K8 float32'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One op on one shape: the workload that a schedule is tuned for.

    Attributes:
        op: which kernel, one of `ALL_OPS`.
        batch, seq_len: `B` and `T` of the queries.
        kv_len: `S`, the number of keys; 0 means `seq_len`. In `hsa_decode`, those in all pages, or if `paged`
            in one sequence.
        num_heads, num_kv_heads: `HQ` and `H`; `HQ` is a multiple of `H`.
        head_dim, value_dim: `D` and `Dv`, at most 256; a value dim of 0 means `head_dim`. In `select_chunks`, the
            retrieval dim, at most 1024.
        chunk_size: `C`, keys in a chunk.
        top_k: `K`, the number of slots of a token; a slot holds a picked chunk or is empty.
        dtype: the dtype of q, k and v, one of `DTYPES`.
        softmax_off_by_one: an extra 1 in the normaliser of each chunk.
        per_head_weights: chunk weights for each query head rather than for each kv head.
        mask_last_token: the last key of each chunk is a landmark and is not attended to.
        landmarks_per_chunk: `R`; in `select_chunks`, a chunk's score is the largest of those of its `R` landmarks.
        fusion: in `select_chunks`, how the picked scores become weights, one of `FUSIONS`.
        noise: in `select_chunks`, whether Gumbel noise is added to the scores that are compared.
        paged: in `hsa_decode`, whether a table says in which page a chunk of a sequence lies.
        packed: several sequences lie one after the other in a batch of one, and chunks begin where a table says.
        deterministic: only schedules that give the same bits twice.

    Raises:
        InvalidProblem: a field is out of range; the message names it, its value and what is allowed.
    """

    op: str = "hsa_forward"
    batch: int = 1
    seq_len: int
    kv_len: int = 0
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int = 0
    chunk_size: int = 64
    top_k: int
    dtype: str = "float32"
    softmax_off_by_one: bool = False
    per_head_weights: bool = False
    mask_last_token: bool = False
    packed: bool = False
    landmarks_per_chunk: int = 1
    fusion: str = "softmax"
    noise: bool = False
    paged: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        # A zero stands for "the same as": it is filled in here, so that equal problems compare equal.
        if self.kv_len == 0:
            object.__setattr__(self, "kv_len", self.seq_len)
        if self.value_dim == 0:
            object.__setattr__(self, "value_dim", self.head_dim)
        check_choice("op", self.op, ALL_OPS, error=InvalidProblem)
        check_choice("dtype", self.dtype, DTYPES, error=InvalidProblem)
        check_choice("fusion", self.fusion, FUSIONS, error=InvalidProblem)
        check_choice("landmarks_per_chunk", self.landmarks_per_chunk, LANDMARKS_PER_CHUNK, error=InvalidProblem)
        for name in (*OPTIONS, "deterministic"):
            check_flag(name, getattr(self, name), error=InvalidProblem)
        for name in ("batch", "seq_len", "kv_len", "num_heads", "num_kv_heads", "top_k"):
            check_count(name, getattr(self, name), 1, 2**40, error=InvalidProblem)
        if self.decodes:
            check_count("seq_len", self.seq_len, 1, MAX_DECODE_TOKENS, error=InvalidProblem)
        most = MAX_RETRIEVAL_DIM if self.selects else MAX_HEAD_DIM
        check_count("head_dim", self.head_dim, 1, most, error=InvalidProblem)
        check_count("value_dim", self.value_dim, 1, most, error=InvalidProblem)
        if self.selects:
            check_count("top_k", self.top_k, 1, MAX_SELECTED, error=InvalidProblem)
        check_count(
            "chunk_size", self.chunk_size, 2 if self.mask_last_token else 1, MAX_CHUNK_SIZE, error=InvalidProblem
        )
        if self.num_heads % self.num_kv_heads:
            raise InvalidProblem(
                f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}"
            )

    @property
    def selects(self) -> bool:
        """Whether this is `select_chunks` or its backward, rather than the attention over what it picks."""
        return self.op in SELECT_OPS

    @property
    def decodes(self) -> bool:
        """Whether this is `hsa_decode`, the attention of few tokens over chunks in pages."""
        return self.op in DECODE_OPS

    @property
    def family(self) -> str:
        """The family in `FAMILIES` that the op belongs to; the op's own name where it belongs to none."""
        return next((name for name, ops in FAMILIES.items() if self.op in ops), self.op)

    @property
    def group(self) -> int:
        """`G`, the query heads that share a kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_chunks(self) -> int:
        """`N`, the whole chunks among the keys."""
        return self.kv_len // self.chunk_size

    @property
    def num_landmarks(self) -> int:
        """`N · R`, the landmarks that queries are compared with in `select_chunks`."""
        return self.num_chunks * self.landmarks_per_chunk

    @property
    def itemsize(self) -> int:
        """Bytes of one element of q, k or v."""
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    def with_op(self, op: str) -> "Problem":
        """Returns the same shape under another op."""
        return replace(self, op=op)

    def bucketed(self) -> "Problem":
        """Returns the problem with its lengths rounded up to powers of two, as the cache is keyed by."""
        return replace(
            self,
            batch=next_power_of_2(self.batch),
            seq_len=next_power_of_2(self.seq_len),
            kv_len=next_power_of_2(self.kv_len),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        return asdict(self)

    @property
    def stands_for_layer(self) -> bool:
        """Whether the flags of a shape say all of it; with them `hsa-compile tune` tunes the selection, too."""
        return self.op in OPS and self.top_k <= MAX_SELECTED and self.describe().endswith(self.dtype)

    def tune_flags(self) -> str:
        """Returns the flags with which `hsa-compile tune` tunes this problem."""
        if not self.stands_for_layer:
            return f'--problem "{self.describe()}"'
        return (
            f"--batch {self.batch} --seq-len {self.seq_len} --heads {self.num_heads} --kv-heads {self.num_kv_heads} "
            f"--head-dim {self.head_dim} --chunk-size {self.chunk_size} --top-k {self.top_k} --dtype {self.dtype}"
        )

    def describe_kernel(self) -> str:
        """Returns one line of what the text of a kernel depends on: everything but lengths and counts."""
        options = [name for name in OPTIONS if getattr(self, name)]
        shape = f"G {self.group}, D {self.head_dim}, Dv {self.value_dim}, C {self.chunk_size}"
        if self.selects:
            shape = f"Dr {self.head_dim}, R {self.landmarks_per_chunk}, C {self.chunk_size}, {self.fusion}"
        return ", ".join([self.dtype, shape, *options])

    def in_words(self) -> str:
        """Returns the problem as a title: what `describe` says, for those who do not know the letters."""
        length = f"{self.seq_len:,} token{'s' * (self.seq_len > 1)}"
        if self.batch > 1:
            length = f"{self.batch:,} times {length}"
        if self.kv_len != self.seq_len:
            length += f" on {self.kv_len:,} keys"
        heads = f"{self.num_kv_heads} {'' if self.selects else 'kv '}head{'s' * (self.num_kv_heads > 1)}"
        if not self.selects:
            heads = f"{self.num_heads} query heads on {heads}"
        options = [name.replace("_", " ") for name in (*OPTIONS, "deterministic") if getattr(self, name)]
        if self.landmarks_per_chunk > 1:
            options.insert(0, f"{self.landmarks_per_chunk} landmarks a chunk")
        if self.fusion != FUSIONS[0]:
            options.append(self.fusion.replace("_", " "))
        parts = [
            length, f"{heads} of width {self.head_dim}", f"chunks of {self.chunk_size}",
            f"{self.top_k} picks a token", self.dtype, *options,
        ]  # fmt: skip
        return f"{_TITLES.get(self.op, self.op)}: {', '.join(parts)}"

    @classmethod
    def parse(cls, text: str) -> "Problem":
        """Reads a problem that `describe` wrote; its words may stand in any order.

        Raises:
            InvalidProblem: a word is unknown, missing or given twice, or a value is out of range.
        """
        fields: dict[str, Any] = {}
        for word in text.split():
            sized = re.fullmatch("([A-Za-z]+)([0-9]{1,18})", word)
            if word in _WORDS:
                name, value = _WORDS[word]
            elif sized and sized[1] in _LETTERS:
                name, value = _LETTERS[sized[1]], int(sized[2])
            else:
                raise InvalidProblem(f"problem {text!r} has a word that no problem has: {word!r}; {_FORM}")
            if name in fields:
                raise InvalidProblem(f"problem {text!r} gives {name} twice; {_FORM}")
            fields[name] = value
        if missing := [name for name in ("op", *_SHAPE.values(), "dtype") if name not in fields]:
            raise InvalidProblem(f"problem {text!r} lacks {', '.join(missing)}; {_FORM}")
        return cls(**fields)

    def describe(self) -> str:
        """Returns the problem in one line for people, which `parse` reads."""
        text = " ".join([self.op, *(f"{letter}{getattr(self, name)}" for letter, name in _SHAPE.items()), self.dtype])
        if self.kv_len != self.seq_len:
            text += f" S{self.kv_len}"
        if self.value_dim != self.head_dim:
            text += f" Dv{self.value_dim}"
        if self.landmarks_per_chunk > 1:
            text += f" R{self.landmarks_per_chunk}"
        if self.fusion != "softmax":
            text += f" {self.fusion}"
        for flag in (*OPTIONS, "deterministic"):
            if getattr(self, flag):
                text += f" {flag}"
        return text


def next_power_of_2(n: int) -> int:
    """Returns the smallest power of two that is at least `n` (1 for n ≤ 1)."""
    return 1 << max(0, n - 1).bit_length()
