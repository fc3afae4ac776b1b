"""Run the Triton kernel of hashed tables in the interpreter; test_hash_triton.py starts this.

The interpreter is chosen when Triton is imported, so it takes a process of its own. It computes
bfloat16 wrongly, which is compiled only.
"""

from __future__ import annotations

import sys

import torch

from blockwright.ir.ops import OPS
from blockwright.kernels.hash_triton import Blocks, hash_linear

REFERENCE = OPS["blockwright.hash_linear.default"].overload
SMALL = Blocks(4, 16, 4)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
CASES = 8


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def size(high: int) -> int:
        return int(torch.randint(1, high + 1, (), generator=generator))

    for number in range(CASES):
        dtype = torch.float16 if number % 3 == 2 else torch.float32
        score = ("l1_softmax", "softmax")[number % 2]
        check(generator, size(6), size(11), size(7), size(40), dtype, score, bias=number % 4 < 2)
    check(generator, 0, 2, 3, 5, torch.float32, "softmax", bias=True)
    sys.stdout.write(f"{CASES + 1} cases agree\n")


def check(
    generator: torch.Generator,
    tokens: int,
    count: int,
    bits: int,
    features: int,
    dtype: torch.dtype,
    score: str,
    *,
    bias: bool,
) -> None:
    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x = make(tokens, count * bits)
    x[:1, ::3] = 0  # zero counts as positive, and so does its negative
    x[1:2, ::2] = -0.0
    x[2:3] *= 1e3
    tables, offset = make(count, 2**bits, features), make(features) if bias else None
    y = hash_linear(x, tables, offset, score, SMALL)
    wide = (x.double(), tables.double(), None if offset is None else offset.double())
    expected = REFERENCE(*wide, score)
    error = float((y.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    assert y.dtype == dtype
    assert y.shape == (tokens, features)
    assert error < TOLERANCE[dtype], (dtype, tokens, count, bits, features, score, error)


if __name__ == "__main__":
    main()
