"""The op in an attention layer of one's own, and what only that layer can learn.

Each row of 512 tokens is noise with a passage of 8 equal tokens somewhere, and its last token asks which one. The layer
sees its own chunk of 32 tokens as usual and picks 4 of the 15 chunks before it. Printed are the shares of right answers
before and after training, and the same for the model without the picked chunks, which can only guess among 8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa_compile import hsa_attention, select_chunks

NOISE, ANSWERS = 32, 8  # tokens 0 … 31 say nothing; 32 … 39 make passages; 40 asks
ASK = NOISE + ANSWERS
LENGTH, CHUNK, PASSAGE = 512, 32, 8


class SparseAttention(nn.Module):
    """Attention to a token's own chunk, plus hierarchical sparse attention to the chunks before that it picks."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, chunk_size: int, top_k: int) -> None:
        super().__init__()
        self.chunk_size, self.top_k = chunk_size, top_k
        self.shape = (num_heads, head_dim)
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.kv_proj = nn.Linear(dim, 2 * head_dim, bias=False)  # one kv head, which all query heads share
        self.retrieve = nn.Linear(dim, head_dim, bias=False)
        self.landmark = nn.Linear(dim, head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, reads_far: bool = True) -> Tensor:
        """`x [B, T, dim]` → `[B, T, dim]`; T is a multiple of the chunk size."""
        B, T, _ = x.shape
        chunks = (B, T // self.chunk_size, self.chunk_size)
        q = self.q_proj(x).view(B, T, *self.shape)  # [B, T, HQ, D]
        k, v = self.kv_proj(x)[:, :, None].chunk(2, dim=-1)  # [B, T, 1, D]

        near = F.scaled_dot_product_attention(
            *(t.reshape(*chunks, *t.shape[2:]).transpose(2, 3) for t in (q, k, v)), is_causal=True, enable_gqa=True
        )  # [B, N, HQ, C, D]
        o = near.transpose(2, 3).reshape(B, T, *self.shape)
        if reads_far:
            query = self.retrieve(x)[:, :, None]  # [B, T, 1, D]
            landmarks = self.landmark(x).view(*chunks, 1, -1).amax(dim=2)  # [B, N, 1, D]
            indices, weights = select_chunks(query, landmarks, chunk_size=self.chunk_size, top_k=self.top_k)
            o = o + hsa_attention(q, k, v, indices, weights, chunk_size=self.chunk_size)
        return self.o_proj(o.flatten(2))


class Model(nn.Module):
    """One layer between an embedding and an output."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ASK + 1, dim)
        self.attention = SparseAttention(dim, num_heads=4, head_dim=16, chunk_size=CHUNK, top_k=4)
        self.output = nn.Linear(dim, ANSWERS)

    def forward(self, tokens: Tensor, reads_far: bool = True) -> Tensor:
        """`tokens [B, T]` → what the last token answers, `[B, ANSWERS]`."""
        x = self.embedding(tokens)
        return self.output((x + self.attention(x, reads_far))[:, -1])


def rows(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens `[count, LENGTH]`, and what the passage of each row is made of."""
    tokens = torch.randint(NOISE, (count, LENGTH), generator=generator)
    answers = torch.randint(ANSWERS, (count,), generator=generator)
    starts = torch.randint(LENGTH - 2 * CHUNK, (count,), generator=generator)  # never in the last token's own chunk
    places = starts[:, None] + torch.arange(PASSAGE)
    tokens.scatter_(1, places, (NOISE + answers)[:, None].expand(-1, PASSAGE))
    tokens[:, -1] = ASK
    return tokens, answers


def train(reads_far: bool, steps: int) -> tuple[float, float]:
    """Shares of right answers on rows that were not trained on, before and after."""
    torch.manual_seed(0)
    model, generator = Model(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    test_tokens, test_answers = rows(64, torch.Generator().manual_seed(2))

    @torch.no_grad()
    def share() -> float:
        return (model(test_tokens, reads_far).argmax(dim=-1) == test_answers).float().mean().item()

    before = share()
    for _ in range(steps):
        tokens, answers = rows(16, generator)
        F.cross_entropy(model(tokens, reads_far), answers).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, share()


def main(steps: int = 120) -> None:
    """Trains with and without the op and prints what came of it."""
    for name, reads_far in (("with the op", True), ("without it", False)):
        before, after = train(reads_far, steps)
        print(f"{name:12} right answers before {before:4.0%}, after {steps} steps {after:4.0%}")


if __name__ == "__main__":
    main()
