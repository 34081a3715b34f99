"""Shapes and tensors that the tests of decoding share, on a CPU and in Triton's interpreter."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hsa_compile import Problem, Schedule, Target, hsa_decode_reference
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit

CPU = Target.parse("cpu")
WITHOUT_COMPILER = replace(CPU, has_compiler=False)


@dataclass(frozen=True)
class Shape:
    B: int = 2
    T: int = 1
    HQ: int = 6
    H: int = 2
    D: int = 24
    Dv: int = 24
    C: int = 16
    P: int = 11
    N: int = 0  # chunks that a page table lists; 0 for no table
    K: int = 5
    off_by_one: bool = False
    per_head: bool = False
    mask_last: bool = False

    def __str__(self) -> str:
        text = (
            f"B{self.B}-T{self.T}-HQ{self.HQ}-H{self.H}-D{self.D}-Dv{self.Dv}-C{self.C}-P{self.P}-N{self.N}-K{self.K}"
        )
        return text + "-off_by_one" * self.off_by_one + "-per_head" * self.per_head + "-mask_last" * self.mask_last


SHAPES = [
    Shape(),
    Shape(N=7),
    Shape(B=1, HQ=1, H=1, K=1, P=2),
    Shape(T=16, HQ=16, H=1, N=9, K=3),
    Shape(T=3, HQ=4, H=4, D=20, Dv=40, C=19),
    Shape(B=3, K=33, N=5),  # K beyond the chunks: duplicates
    Shape(N=7, per_head=True, off_by_one=True),
    Shape(N=7, mask_last=True, C=9, per_head=True),
    Shape(off_by_one=True, mask_last=True, C=2),
]


@dataclass(frozen=True)
class Case:
    """Random tensors of a shape: the first row is empty, and what must not be read is NaN."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int32

    def tensors(self) -> tuple[list[Tensor], Tensor | None]:
        """q, k_chunks, v_chunks, chunk_indices, chunk_weights; and page_table."""
        shape, random = self.shape, torch.Generator().manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=random).to(self.dtype)

        num_chunks = shape.N or shape.P
        indices = torch.randint(-2, num_chunks + 1, (shape.B, shape.T, shape.H, shape.K), generator=random)
        indices[0, 0, 0] = -1
        indices[indices == num_chunks] = 2**31 - 1
        heads = shape.HQ if shape.per_head else shape.H
        weights = torch.rand(shape.B, shape.T, heads, shape.K, generator=random)
        pages, table = indices, None
        if shape.N:
            table = torch.randint(-2, shape.P + 1, (shape.B, shape.N), generator=random).to(self.index_dtype)
            inside = (indices >= 0) & (indices < shape.N)
            pages = table.gather(1, torch.where(inside, indices, 0).flatten(1)).view_as(indices)
            pages = torch.where(inside, pages, -1)
        empty = (pages < 0) | (pages >= shape.P)
        weights[empty.repeat_interleave(heads // shape.H, dim=2)] = float("nan")
        k = normal(shape.P, shape.H, shape.C, shape.D)
        v = normal(shape.P, shape.H, shape.C, shape.Dv)
        unread = torch.ones(shape.P, shape.H, dtype=torch.bool)
        for h in range(shape.H):
            unread[pages[:, :, h][~empty[:, :, h]].unique().long(), h] = False
        k[unread], v[unread] = float("nan"), float("nan")
        if shape.mask_last:
            k[:, :, -1], v[:, :, -1] = float("nan"), float("nan")
        q = normal(shape.B, shape.T, shape.HQ, shape.D)
        return [q, k, v, indices.to(self.index_dtype), weights], table

    def options(self) -> dict[str, bool]:
        return {"softmax_off_by_one": self.shape.off_by_one, "mask_last_token": self.shape.mask_last}

    def expected(self) -> Tensor:
        """o in float64, from a pool whose NaN are gone."""
        (q, k, v, indices, weights), table = self.tensors()
        k, v = k.double().nan_to_num(0.0), v.double().nan_to_num(0.0)
        return hsa_decode_reference(q.double(), k, v, indices, weights, page_table=table, **self.options())

    def problem(self) -> Problem:
        shape = self.shape
        return Problem(
            op="hsa_decode", batch=shape.B, seq_len=shape.T, kv_len=(shape.N or shape.P) * shape.C,
            num_heads=shape.HQ, num_kv_heads=shape.H, head_dim=shape.D, value_dim=shape.Dv, chunk_size=shape.C,
            top_k=shape.K, dtype=str(self.dtype).removeprefix("torch."), softmax_off_by_one=shape.off_by_one,
            per_head_weights=shape.per_head, mask_last_token=shape.mask_last, paged=shape.N > 0,
        )  # fmt: skip

    def run(self, schedule: Schedule, target: Target = CPU) -> Tensor:
        """o of the kernel that a schedule becomes."""
        tensors, table = self.tensors()
        kernel = compile_kernel(emit(self.problem(), schedule, target))
        options = {"scale": self.shape.D**-0.5} | ({} if table is None else {"page_table": table})
        return kernel.entry(*tensors, **options)
