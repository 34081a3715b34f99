"""The long-range layers of a Hugging Face model, swapped for hierarchical sparse attention with the weights they had.

A tiny Llama is built from a config; nothing is downloaded. Its upper two layers then attend to their own chunk as
before and, instead of to all that is earlier, to the 4 chunks that they pick. Printed: a text of one chunk gives the
logits that it gave before the swap; a long one trains, and the weights of the new retrieval get gradients; `generate`
continues it without a cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from hsa_compile import hsa_attention, select_chunks

CHUNK, TOP_K = 32, 4


class HSALlamaAttention(nn.Module):
    """Takes the place and the projections of a `LlamaAttention`.

    The own chunk keeps its rotary positions. What is picked is read without positions, as in the papers: so it works at
    lengths that were not trained on.
    """

    def __init__(self, old: LlamaAttention) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = old.q_proj, old.k_proj, old.v_proj, old.o_proj
        self.head_dim, self.scale = old.head_dim, old.scaling
        self.retrieve = nn.Linear(old.k_proj.in_features, old.k_proj.out_features, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: object = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """`[B, T, dim]` → `[B, T, dim]`, and no attention weights."""
        if past_key_values is not None:
            raise ValueError("these layers keep no cache: pass use_cache=False")
        B, T, _ = hidden_states.shape
        q, k, v, query = (
            project(hidden_states).view(B, T, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj, self.retrieve)
        )
        o = self.own_chunk(q, k, v, position_embeddings)
        N = T // CHUNK  # whole chunks
        landmarks = k[:, : N * CHUNK].unflatten(1, (N, CHUNK)).mean(dim=2)  # [B, N, H, D]
        indices, weights = select_chunks(query, landmarks, chunk_size=CHUNK, top_k=TOP_K)
        o = o + hsa_attention(q, k, v, indices, weights, chunk_size=CHUNK, scale=self.scale)
        return self.o_proj(o.flatten(2)), None

    def own_chunk(self, q: Tensor, k: Tensor, v: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Causal attention inside each chunk, `[B, T, HQ, D]`; the last chunk is padded behind its end."""
        B, T, HQ, _ = q.shape
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        padding = -T % CHUNK
        chunks = [F.pad(x, (0, 0, 0, 0, 0, padding)).view(-1, CHUNK, *x.shape[2:]).transpose(1, 2) for x in (q, k, v)]
        o = F.scaled_dot_product_attention(*chunks, is_causal=True, scale=self.scale, enable_gqa=True)
        return o.transpose(1, 2).reshape(B, T + padding, HQ, -1)[:, :T]


def swap(model: LlamaForCausalLM, first_layer: int) -> None:
    """Replaces the attention of the layers from `first_layer` on."""
    for layer in model.model.layers[first_layer:]:
        layer.self_attn = HSALlamaAttention(layer.self_attn)
    model.config.use_cache = model.generation_config.use_cache = False


def main() -> None:
    """Builds, swaps, and prints what works."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    short, long = torch.randint(256, (1, CHUNK)), torch.randint(256, (2, 1000))
    with torch.no_grad():
        before = model(short).logits
        swap(model, first_layer=2)
        difference = (model(short).logits - before).abs().max().item()
    print(f"swapped layers 2 and 3 of {config.num_hidden_layers}; one chunk: logits differ by {difference:.1e} at most")

    loss = model(long, labels=long).loss
    loss.backward()
    gradients = [layer.self_attn.retrieve.weight.grad.norm().item() for layer in model.model.layers[2:]]
    print(f"1,000 tokens: loss {loss:.3f}, gradient of the retrieval {', '.join(f'{g:.1e}' for g in gradients)}")

    prompt = long[:1]
    out = model.eval().generate(prompt, max_new_tokens=5, do_sample=False)
    again = prompt
    with torch.no_grad():
        for _ in range(5):
            again = torch.cat((again, model(again).logits[:, -1:].argmax(dim=-1)), dim=1)
    print(f"generate: {out[0, 1000:].tolist()}, as by hand: {torch.equal(out, again)}")


if __name__ == "__main__":
    main()
