"""Run the Triton kernels of experts in the interpreter; test_moe_triton.py starts this.

The interpreter is chosen when Triton is imported, so it takes a process of its own. It computes
bfloat16 wrongly, which is compiled only.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from blockwright.ir.ops import OPS
from blockwright.kernels.activations import FUNCTIONS
from blockwright.kernels.experts import Experts
from blockwright.kernels.moe_triton import Blocks, moe_ffn

REFERENCE = OPS["blockwright.moe_ffn.default"].overload
SMALL = Blocks(16, 16, 16, 4, 1)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def size(high: int) -> int:
        return int(torch.randint(1, high + 1, (), generator=generator))

    done = 0
    for number, activation in enumerate(FUNCTIONS):
        dtype = torch.float16 if number % 3 == 2 else torch.float32
        count = size(5)
        sizes = (size(24), count, size(count), size(24), size(24))
        gated, bias = bool(number % 2), bool(number % 3)
        check(generator, *sizes, activation, dtype, gated=gated, bias=bias)
        done += 1
    check(generator, 20, 4, 2, 16, 32, "silu", torch.float32, gated=True, bias=True, skewed=True)
    check(generator, 1, 6, 2, 16, 16, "gelu", torch.float32, gated=False, bias=True)
    check(generator, 3, 2, 0, 16, 16, "gelu", torch.float32, gated=False, bias=True)
    sys.stdout.write(f"{done + 3} cases agree\n")


def check(
    generator: torch.Generator,
    tokens: int,
    count: int,
    k: int,
    ffn_dim: int,
    dim: int,
    activation: str,
    dtype: torch.dtype,
    *,
    gated: bool,
    bias: bool,
    skewed: bool = False,
) -> None:
    def make(*shape: int, there: bool = True) -> Tensor | None:
        values = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return values.to(dtype) if there else None

    index = torch.rand(tokens, count, generator=generator).topk(k, dim=-1).indices
    if skewed:
        index = torch.arange(k).repeat(tokens, 1)
    x, weight = torch.randn(tokens, dim, generator=generator).to(dtype), make(tokens, max(k, 1))
    assert weight is not None
    weight = weight[:, :k]
    tensors = (
        make(count, ffn_dim, dim, there=gated), make(count, ffn_dim, dim),
        make(count, ffn_dim, there=bias), make(count, ffn_dim, there=gated and bias),
        make(count, dim, ffn_dim), make(count, dim, there=bias),
    )  # fmt: skip
    y = moe_ffn(x, index, weight, Experts(*tensors, activation), SMALL)
    wide = (None if t is None else t.double() for t in tensors)
    expected = REFERENCE(x.double(), index, weight.double(), *wide, activation)
    error = float((y.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    assert y.dtype == dtype
    assert error < TOLERANCE[dtype], (activation, dtype, tokens, count, k, ffn_dim, dim, error)


if __name__ == "__main__":
    main()
