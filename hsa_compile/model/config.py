"""What a model is made of: one frozen config for the whole family, and the list of layers that follows from it.

It also holds the names and limits that the model and the command line share: where a memory lies, how an answer is
judged, which steps can be profiled.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hsa_compile.checks import check_choice, check_count, check_flag, check_number, one_line, shown
from hsa_compile.errors import InvalidArgument
from hsa_compile.problem import LANDMARKS_PER_CHUNK, MAX_CHUNK_SIZE, MAX_HEAD_DIM, MAX_RETRIEVAL_DIM, MAX_SELECTED

VARIANTS = ("hsa-ultralong", "ramba", "drt", "swa", "full")

PLACEMENTS = ("device", "host", "disk")  # where a memory keeps its keys and values
MAX_SEED = 2**63 - 1  # the largest seed of a text that is continued

TEACHER_FORCED, GREEDY = "teacher-forced", "greedy"
PROTOCOLS = {
    TEACHER_FORCED: "the authors' protocol: arg-max at each token of an answer given the true tokens before it; "
    "every token of every answer must be right",
    GREEDY: "greedy generation, token by token, from each question, with its own answers to earlier questions; "
    "the text up to the first full stop must be the answer",
}
PERPLEXITY = "ppl"  # a task of the evaluation beside the retrieval tasks

TRAIN, PREFILL, DECODE = "train", "prefill", "decode"
STEPS = (TRAIN, PREFILL, DECODE)  # the steps that can be profiled

AUTO, GATHER, TRAVEL = "auto", "gather", "travel"
CHUNK_EXCHANGES = (AUTO, GATHER, TRAVEL)  # how processes that share rows read each other's chunks

DEFAULT_MFU = 0.4  # share of the peak that training and serving are assumed to reach on paper

_COUNT = 2**31
# With these bounds no product of sizes, which is how many numbers a weight has, exceeds what PyTorch counts in 64 bits.
_WIDTH, _HEADS = 2**20, 2**16
MAX_LAYERS = 1000
_RANGES = (
    ("vocab_size", 1, _COUNT),
    ("dim", 1, _WIDTH),
    ("embedding_window", 1, 64),
    ("num_lower_layers", 0, MAX_LAYERS),
    ("num_groups", 1, MAX_LAYERS),
    ("layers_per_group", 1, MAX_LAYERS),
    ("num_heads", 1, _HEADS),
    ("num_kv_heads", 1, _HEADS),
    ("head_dim", 2, MAX_HEAD_DIM),
    ("window", 1, _COUNT),
    ("ffn_dim", 1, _WIDTH),
    ("chunk_size", 1, MAX_CHUNK_SIZE),
    ("top_k", 1, MAX_SELECTED),
    ("memory_heads", 1, _HEADS),
    ("memory_kv_heads", 1, _HEADS),
    ("memory_head_dim", 2, MAX_HEAD_DIM),
    ("retrieval_dim", 1, MAX_RETRIEVAL_DIM),
    ("encoder_layers", 0, 100),
    ("encoder_ffn_dim", 1, _WIDTH),
    ("num_experts", 0, 2**16),
    ("experts_per_token", 0, 2**16),
    ("expert_dim", 0, _WIDTH),
    ("num_dense_layers", 0, 1000),
    ("num_shared_experts", 0, 100),
    ("state_dim", 1, 1024),
    ("mamba_head_dim", 1, 1024),
    ("mamba_expand", 1, 16),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What one layer holds, in the order in which it runs.

    Attributes:
        mixer: `window`, `full` or `mamba`; `none` for a layer that only reads the memory.
        retrieves: whether it chooses chunks anew; else it reads those of the last layer that did.
        reads_memory: whether it attends to chunks of the memory.
        mlp: `dense`, `moe` or `none`.
    """

    mixer: str
    retrieves: bool = False
    reads_memory: bool = False
    mlp: str = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of one model of the family.

    Attributes:
        variant: `hsa-ultralong` (arXiv 2511.23319), `ramba` (2504.16795), `drt` (2410.01651), or a baseline without
            a memory: `swa` (sliding windows alone), `full` (attention to everything).
        vocab_size: `V`; 256 for bytes.
        dim: width of the residual stream.
        embedding_window: how many tokens the embedding of a token is made of: its own and those before it, which are
            added by a depthwise convolution. 1 takes its own alone.
        num_lower_layers: layers below the memory.
        num_groups, layers_per_group: how many groups the upper half has, and how many layers each has; the first
            layer of a group retrieves.
        num_heads, num_kv_heads, head_dim: `HQ`, `H` and `D` of the attention inside a layer (window or full).
        window: tokens that sliding-window attention sees, the own one included.
        ffn_dim: inner width of a dense SwiGLU.
        rope_theta: base of RoPE.
        chunk_size, top_k: `C` and `K` of the memory.
        memory_heads, memory_kv_heads, memory_head_dim: `HQ`, `H`, `D` of the attention to chunks.
        retrieval_dim: `Dr` of one of the `memory_kv_heads` retrieval heads.
        pooled_landmarks: how many landmarks a chunk has, each of which also has the maximum, over its share of the
            chunk's tokens, of a projection. Other tokens do not dilute there what one says, as they do in the mean that
            attention takes, and a chunk that holds several names can be found by each. 0: one without a maximum.
        retrieval_norm: whether retrieval queries and landmarks are normalised, which is an option of the authors' code.
        retrieval_scale: factor on the scores of landmarks. The larger it is, the less weight goes to chunks that were
            chosen only because no others were better.
        softmax_off_by_one: whether each chunk's softmax has an extra 1 in its normaliser, so that a chunk may say that
            it holds nothing of use; `drt` always has it.
        encoder_layers, encoder_ffn_dim: how many layers the chunk encoder has, and the inner width of their MLPs.
        selection_noise: whether Gumbel noise is added when chunks are chosen in training.
        num_experts: `E` of a MoE layer; 0 makes every MLP dense.
        experts_per_token, expert_dim, num_shared_experts: how many experts a token passes in a MoE layer, the inner
            width of one expert, and how many shared experts there are.
        num_dense_layers: how many of the first layers keep a dense MLP.
        state_dim, mamba_head_dim, mamba_expand: sizes of a Mamba-2 layer: its state, its heads, and its inner width as
            a multiple of `dim`.
        tie_embeddings: whether the output layer is the embedding.
        norm_eps: what every RMSNorm adds to the mean square.
        init_std: standard deviation of initial weights.

    Raises:
        InvalidArgument: a field is out of range; the message names it, its value and what is allowed.
    """

    variant: str = "hsa-ultralong"
    vocab_size: int
    dim: int
    embedding_window: int = 1
    num_lower_layers: int
    num_groups: int
    layers_per_group: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    ffn_dim: int
    rope_theta: float = 10_000.0
    chunk_size: int = 64
    top_k: int = 64
    memory_heads: int
    memory_kv_heads: int
    memory_head_dim: int
    retrieval_dim: int
    pooled_landmarks: int = 0
    retrieval_norm: bool = False
    retrieval_scale: float = 1.0
    softmax_off_by_one: bool = False
    encoder_layers: int = 1
    encoder_ffn_dim: int
    selection_noise: bool = True
    num_experts: int = 0
    experts_per_token: int = 4
    expert_dim: int = 0
    num_shared_experts: int = 1
    num_dense_layers: int = 1
    state_dim: int = 64
    mamba_head_dim: int = 32
    mamba_expand: int = 2
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        for name, low, high in _RANGES:
            check_count(name, getattr(self, name), low, high)
        if self.num_layers > MAX_LAYERS:
            raise InvalidArgument(
                f"num_lower_layers = {self.num_lower_layers} with {self.num_groups} groups of {self.layers_per_group} "
                f"layers are {self.num_layers} layers; at most {MAX_LAYERS} are allowed"
            )
        for heads, kv_heads in (("num_heads", "num_kv_heads"), ("memory_heads", "memory_kv_heads")):
            if getattr(self, heads) % getattr(self, kv_heads):
                raise InvalidArgument(
                    f"{heads} = {getattr(self, heads)} must be a multiple of {kv_heads} = {getattr(self, kv_heads)}"
                )
        if self.head_dim % 2:
            raise InvalidArgument(f"head_dim = {self.head_dim} must be even, since RoPE turns pairs")
        for name in ("rope_theta", "retrieval_scale", "norm_eps", "init_std"):
            check_number(name, getattr(self, name), 1e-30, 1e30)
        check_choice("pooled_landmarks", self.pooled_landmarks, (0, *LANDMARKS_PER_CHUNK))
        if self.chunk_size % self.landmarks_per_chunk:
            raise InvalidArgument(
                f"pooled_landmarks = {self.pooled_landmarks} must divide chunk_size = {self.chunk_size}"
            )
        for name in ("retrieval_norm", "softmax_off_by_one", "selection_noise", "tie_embeddings"):
            check_flag(name, getattr(self, name))
        self._check_experts()
        if self.variant == "drt" and self.chunk_size < 2:
            raise InvalidArgument(
                f"chunk_size = {self.chunk_size} must be at least 2: drt puts a landmark in each chunk"
            )

    def _check_experts(self) -> None:
        if self.num_experts == 0:
            return
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise InvalidArgument(
                f"experts_per_token = {self.experts_per_token} must be an integer in 1 … {self.num_experts}"
            )
        if self.expert_dim < 1:
            raise InvalidArgument(f"expert_dim = {self.expert_dim} must be at least 1 where there are experts")

    @property
    def num_layers(self) -> int:
        """How many layers both halves have."""
        return self.num_lower_layers + self.num_upper_layers

    @property
    def num_upper_layers(self) -> int:
        """How many layers are above the memory."""
        return self.num_groups * self.layers_per_group

    @property
    def has_memory(self) -> bool:
        """Whether there are chunks to retrieve from; the baselines have none."""
        return self.variant not in ("swa", "full")

    @property
    def landmarks_per_chunk(self) -> int:
        """`R`, how many landmarks a chunk has."""
        return max(1, self.pooled_landmarks)

    @property
    def has_landmark_tokens(self) -> bool:
        """Whether the model puts a token of its own at the end of each chunk and retrieves by it (DRT)."""
        return self.variant == "drt"

    @property
    def reads_off_by_one(self) -> bool:
        """Whether a chunk's softmax has an extra 1: where that is asked for, and in DRT."""
        return self.softmax_off_by_one or self.variant == "drt"

    @property
    def fusion(self) -> str:
        """How the picked scores become weights, as `select_chunks` names it."""
        return "stick_breaking" if self.variant == "ramba" else "softmax"

    @property
    def bypass(self) -> bool:
        """Whether what is read from the memory goes into the MLP alone: `out = x + MLP(norm(x + HSA))`."""
        return self.variant == "hsa-ultralong"

    @property
    def lower_reach(self) -> int:
        """How many tokens back the lower half's output depends on, if its layers are windows."""
        back = self.embedding_window - 1
        if self.has_landmark_tokens:  # which lie between those tokens of text
            back += -(-back // (self.chunk_size - 1))
        return self.num_lower_layers * (self.window - 1) + back

    def layer_position(self, place: int) -> int:
        """Returns where a token of text stands in the layers: DRT puts a landmark token behind each C − 1."""
        return place + place // (self.chunk_size - 1) if self.has_landmark_tokens else place

    def text_length(self, position: int) -> int:
        """Returns how many tokens of text come before a position of the layers."""
        return position - position // self.chunk_size if self.has_landmark_tokens else position

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """All layers from the bottom up."""
        lower = tuple(self._layer(i) for i in range(self.num_lower_layers))
        upper = []
        for i in range(self.num_upper_layers):
            first = i % self.layers_per_group == 0
            if self.variant == "ramba" and first:
                # One retrieval serves all groups; the layer that reads has neither mixer nor MLP.
                upper.append(LayerSpec(mixer="none", retrieves=i == 0, reads_memory=True, mlp="none"))
                continue
            upper.append(
                replace(
                    self._layer(self.num_lower_layers + i),
                    retrieves=self.has_memory and self.variant != "ramba" and first,
                    reads_memory=self.variant == "drt" or (self.variant == "hsa-ultralong" and first),
                )
            )
        return lower + tuple(upper)

    def _layer(self, index: int) -> LayerSpec:
        if self.variant == "ramba":
            return LayerSpec(mixer="mamba", mlp="none")
        sparse = self.num_experts > 0 and index >= self.num_dense_layers
        return LayerSpec(mixer="full" if self.variant == "full" else "window", mlp="moe" if sparse else "dense")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "ModelConfig":
        """Makes the config that `to_dict` wrote.

        Raises:
            InvalidArgument: a field is missing, unknown or out of range.
        """
        if not isinstance(values, Mapping):
            raise InvalidArgument(f"the model config is {shown(values)}, not an object")
        known = {spec.name for spec in fields(ModelConfig)}
        if unknown := set(values) - known:
            raise InvalidArgument(f"the model config has unknown fields {shown(sorted(unknown))}")
        try:
            return ModelConfig(**values)
        except TypeError as error:
            raise InvalidArgument(f"the model config is not complete: {one_line(error)}") from error
