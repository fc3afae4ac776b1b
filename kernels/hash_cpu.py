"""Tables read by hash on a CPU: one `embedding_bag` over all of them. Inference only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .hashing import hashed, rows_of


class HashedTables(nn.Module):
    """A hashed layer behind one op of ours, which PyTorch and Inductor call alike.

    The op also keeps `embedding_bag` from Inductor: packages of torch 2.13 call it with wrong rows.
    """

    tables: Tensor
    bias: Tensor | None

    def __init__(
        self,
        tables: Float[Tensor, "tables rows out_features"],
        bias: Float[Tensor, " out_features"] | None,
        score: str,
    ) -> None:
        super().__init__()
        self.register_buffer("tables", tables)
        self.register_buffer("bias", bias)
        self.score = score

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Tensor:
        return torch.ops.blockwright_cpu.hash_linear(x, self.tables, self.bias, self.score)


# `define` instead of `custom_op`, and the namespace: as in `cpu_linear`.
torch.library.define(
    "blockwright_cpu::hash_linear", "(Tensor x, Tensor tables, Tensor? bias, str score) -> Tensor"
)


@torch.library.impl("blockwright_cpu::hash_linear", "cpu")
def _hash_linear(x: Tensor, tables: Tensor, bias: Tensor | None, score: str) -> Tensor:
    bits, features = x.shape[-1] // len(tables), tables.shape[-1]
    code, weight = hashed(x.reshape(-1, x.shape[-1]), bits, score)
    y = F.embedding_bag(
        rows_of(code, bits), tables.flatten(0, 1), mode="sum",
        per_sample_weights=weight.to(tables.dtype),
    )  # fmt: skip
    y = y if bias is None else y.add_(bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], features)


@torch.library.register_fake("blockwright_cpu::hash_linear")  # type: ignore[untyped-decorator]
def _(x: Tensor, tables: Tensor, bias: Tensor | None, score: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], tables.shape[-1]))
