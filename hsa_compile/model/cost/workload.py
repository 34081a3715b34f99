"""What a model will ask of the schedule cache, so that exactly that can be tuned beforehand."""

import math
from dataclasses import replace

from hsa_compile.checks import check_choice
from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers.picked_chunks import ChunkTraffic
from hsa_compile.problem import DTYPES, Problem, next_power_of_2


def problems(
    config: ModelConfig,
    batch: int,
    seq_len: int,
    dtype: str = "float32",
    *,
    training: bool = True,
    in_batch_memory: bool = False,
) -> list[Problem]:
    """Returns the problems of a step of training, or of reading without gradients.

    Training asks for attention and selection, forward and backward, with noise on the selection where the config has
    it. Reading asks for a forward pass over whole texts, and for decoding with all slots filled; what the memory asks
    for while it takes in a prompt depends on how much it holds, and is left out.

    Args:
        config: the config of the model.
        batch: how many texts a step has.
        seq_len: how many tokens a text has.
        dtype: the dtype of the activations that reach the kernels; under autocast, autocast's.
        training: whether the step trains; otherwise it reads.
        in_batch_memory: whether, in training, each text also sees the chunks of all others.

    Returns:
        each problem once; none for the baselines, which have no memory, or where no token sees a chunk.

    Raises:
        InvalidArgument: batch, seq_len or dtype is not allowed.
    """
    for name, value in (("batch", batch), ("seq_len", seq_len)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidArgument(f"{name} = {value!r} must be an integer of at least 1")
    check_choice("dtype", dtype, DTYPES)
    if not config.has_memory:
        return []
    positions = seq_len + (seq_len // (config.chunk_size - 1) if config.has_landmark_tokens else 0)
    if positions < config.chunk_size:
        return []
    shared = batch if in_batch_memory else 1
    attention = _attention(config, batch, positions, dtype, shared)
    select = _select(config, batch, positions, dtype, shared, noise=training and config.selection_noise)
    if not training:
        # DRT reads the landmark token that it puts behind a text's token together with that one.
        steps = (1, 2) if config.has_landmark_tokens else (1,)
        return [attention, *select, *(_decode(config, batch, positions, dtype, step) for step in steps)]
    backward = [
        problem.with_op("select_chunks_backward") for problem in _select(config, batch, positions, dtype, shared)
    ]
    return [attention, attention.with_op("hsa_backward"), *select, *backward]


def of_a_part(problem: Problem, traffic: ChunkTraffic, exchange: str) -> Problem:
    """Returns what a process asks for instead that computes one of several parts of each row.

    Args:
        problem: what it would ask for with whole rows.
        traffic: how the rows are divided.
        exchange: how processes read each other's chunks, one of `CHUNK_EXCHANGES`.
    """
    own = replace(problem, seq_len=-(-problem.seq_len // traffic.parts))
    if traffic.parts == 1 or problem.op not in ("hsa_forward", "hsa_backward") or not traffic.travels(exchange):
        return own
    heads = problem.num_kv_heads  # each of a token's counts as a token then, and all rows stand in one list
    return replace(
        own,
        batch=1,
        seq_len=own.batch * heads * own.seq_len,
        kv_len=math.ceil(heads * traffic.kept) * problem.chunk_size,
        num_heads=problem.num_heads // heads,
        num_kv_heads=1,
    )


def _attention(config: ModelConfig, batch: int, positions: int, dtype: str, shared: int) -> Problem:
    return Problem(
        op="hsa_forward",
        batch=batch,
        seq_len=positions,
        kv_len=shared * (positions // config.chunk_size) * config.chunk_size,
        num_heads=config.memory_heads,
        num_kv_heads=config.memory_kv_heads,
        head_dim=config.memory_head_dim,
        chunk_size=config.chunk_size,
        top_k=config.top_k,
        dtype=dtype,
        softmax_off_by_one=config.reads_off_by_one,
        mask_last_token=config.has_landmark_tokens,
    )


def _select(
    config: ModelConfig, batch: int, positions: int, dtype: str, shared: int, *, noise: bool = False
) -> list[Problem]:
    """Returns one problem, or none if no token sees a chunk; DRT selects for chunks, which are its tokens then."""
    num_chunks = positions // config.chunk_size
    chunk_size = 1 if config.has_landmark_tokens else config.chunk_size
    queries = num_chunks if config.has_landmark_tokens else positions
    if queries <= chunk_size and shared == 1:
        return []
    problem = Problem(
        op="select_chunks",
        batch=batch,
        seq_len=queries,
        kv_len=shared * num_chunks * chunk_size,
        num_heads=config.memory_kv_heads,
        num_kv_heads=config.memory_kv_heads,
        head_dim=config.retrieval_dim,
        landmarks_per_chunk=config.landmarks_per_chunk,
        chunk_size=chunk_size,
        top_k=config.top_k,
        dtype=dtype,
        fusion=config.fusion,
        noise=noise,
    )
    return [problem]


def _decode(config: ModelConfig, batch: int, positions: int, dtype: str, num_tokens: int) -> Problem:
    """Asks as `ChunkMemory.attend` does: a batch of kv heads, each with its chosen chunks to itself; DRT by rows."""
    rows = (1 if config.has_landmark_tokens else batch) * config.memory_kv_heads
    chosen = rows * min(config.top_k, positions // config.chunk_size)
    return Problem(
        op="hsa_decode",
        batch=rows,
        seq_len=num_tokens,
        kv_len=next_power_of_2(chosen) * config.chunk_size,
        num_heads=config.memory_heads // config.memory_kv_heads,
        num_kv_heads=1,
        head_dim=config.memory_head_dim,
        chunk_size=config.chunk_size,
        top_k=config.top_k,
        dtype=dtype,
        softmax_off_by_one=config.reads_off_by_one,
        mask_last_token=config.has_landmark_tokens,
    )
