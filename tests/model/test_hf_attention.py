"""`attn_implementation="hsa"` computes its definition, in a Llama: forward, backward, with a cache and with padding."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
pytest.importorskip("hsa_compile.model.hf")
attention = pytest.importorskip("hsa_compile.model.hf.attention")
pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

SIZES = {"chunk_size": 4, "top_k": 2, "window_chunks": 1}
TOKENS = torch.randint(31, (2, 45), generator=torch.Generator().manual_seed(0))


def reference(q: Tensor, k: Tensor, v: Tensor, sizes: Any, scale: float) -> Tensor:
    """The definition at the head of the module, token by token and head by head."""
    (B, T, HQ, D), H = q.shape, k.shape[2]
    C, past, G = sizes.chunk_size, k.shape[1] - T, HQ // k.shape[2]
    out = torch.zeros(B, T, HQ, D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            place = past + t
            begin = max(0, (place // C - sizes.window_chunks) * C)
            for h in range(H):
                heads = range(h * G, (h + 1) * G)
                keys, values = k[b, :, h].double(), v[b, :, h].double()
                chunks = keys[:begin].view(-1, C, D)
                both = sum(q[b, t, head].double() for head in heads)
                picks = (chunks.mean(1) @ both).topk(min(sizes.top_k, len(chunks))).indices.tolist()
                for head in heads:
                    query = q[b, t, head].double() * scale
                    logits = keys[begin : place + 1] @ query
                    masses = [logits.logsumexp(0)]
                    parts = [logits.softmax(0) @ values[begin : place + 1]]
                    for i in picks:
                        masses.append((chunks[i].mean(0) @ query) + math.log(C))
                        inside = (chunks[i] @ query).softmax(0)
                        parts.append(inside @ values[i * C : (i + 1) * C])
                    shares = torch.stack(masses).softmax(0)
                    out[b, t, head] = (shares[:, None] * torch.stack(parts)).sum(0)
    return out


def tensors(T: int, S: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = ((2, T, 6, 8), (2, S, 2, 8), (2, S, 2, 8))
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("T", "S", "sizes"),
    [
        (29, 29, SIZES),
        (5, 29, SIZES),
        (1, 30, {"chunk_size": 5, "top_k": 3, "window_chunks": 0}),
        (9, 9, {"chunk_size": 4, "top_k": 128, "window_chunks": 2}),
    ],
    ids=["text", "piece", "token", "all_in_the_window"],
)
def test_it_computes_the_definition_and_its_gradients(T: int, S: int, sizes: dict[str, int]) -> None:
    inputs = [x.requires_grad_() for x in tensors(T, S)]
    chosen = attention.AttentionSizes(**sizes)
    found = attention.attend_to_window_and_chunks(*inputs, chosen, 0.3)
    expected = reference(*inputs, chosen, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = [torch.autograd.grad((o * weight).sum(), inputs) for o in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_half_precision_stays_near_the_definition() -> None:
    inputs = tensors(29, 29, torch.bfloat16)
    sizes = attention.AttentionSizes(**SIZES)
    found = attention.attend_to_window_and_chunks(*inputs, sizes, 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), reference(*inputs, sizes, 0.3), atol=3e-2, rtol=3e-2)


def test_equal_keys_within_chunks_give_full_attention() -> None:
    q, k, v = tensors(28, 28)
    k = k[:, ::4].repeat_interleave(4, dim=1)
    found = attention.attend_to_window_and_chunks(q, k, v, attention.AttentionSizes(chunk_size=4, window_chunks=1), 0.3)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, full.transpose(1, 2), atol=1e-10, rtol=1e-10)


def llama(implementation: str = "hsa", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None, initializer_range=0.3, **changes
    )  # fmt: skip
    config.hsa_attention = SIZES
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def test_a_llama_gives_what_full_attention_gives_within_the_window_and_trains_beyond() -> None:
    sparse, full = llama(), llama("sdpa")
    torch.testing.assert_close(sparse(TOKENS[:, :8]).logits, full(TOKENS[:, :8]).logits, atol=1e-5, rtol=1e-5)
    logits = sparse(TOKENS).logits
    assert (logits - full(TOKENS).logits).abs().max() > 1e-3
    torch.testing.assert_close(sparse(TOKENS[:, :29]).logits, logits[:, :29], atol=1e-5, rtol=1e-5)  # it is causal
    sparse.train()
    sparse(TOKENS, labels=TOKENS).loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in sparse.parameters())


def test_a_llama_goes_on_from_its_cache_and_behind_padding() -> None:
    model = llama()
    tokens, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    tokens[0, :7] = mask[0, :7] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    padded = model.generate(tokens, attention_mask=mask, **options)
    without = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    alone = model.generate(tokens[:1, 7:], attention_mask=mask[:1, 7:], **options)
    torch.testing.assert_close(torch.stack(padded.logits), torch.stack(without.logits), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(padded.logits)[:, 0], torch.stack(alone.logits)[:, 0], atol=1e-4, rtol=1e-4)
    behind = model(tokens.flip(1), attention_mask=mask.flip(1)).logits
    torch.testing.assert_close(behind[0, :38], model(tokens.flip(1)[:1, :38]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_mask": torch.tensor([[1] * 20 + [0] * 5 + [1] * 20] * 2)}, "attention_mask has 0 inside"),
        ({"attention_mask": torch.ones(2, 1, 45, 45, dtype=torch.bool)}, "a mask for each pair of tokens"),
        ({"position_ids": torch.cat((torch.arange(20), torch.arange(25)))[None]}, "no packed ones"),
    ],
    ids=["hole", "pairs", "packed"],
)
def test_what_it_does_not_compute_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        llama()(TOKENS, use_cache=False, **change)


def test_settings_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="takes a cache that grows"):
        llama().generate(TOKENS, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(InvalidArgument, match="does not take dropout"):
        llama(attention_dropout=0.1).train()(TOKENS)
    model = llama()
    for sizes, named in (
        ({"top": 3}, "hsa_attention names top"),
        ({"top_k": 0}, "top_k = 0"),
        ({"chunk_size": 1.5}, "chunk_size"),
    ):
        model.config.hsa_attention = sizes
        with pytest.raises(InvalidArgument, match=named):
            model(TOKENS)
