"""Run the Triton kernel of block attention in the interpreter.

test_block_attention_triton.py starts this: the interpreter is chosen when Triton is imported, so it
takes a process of its own. It computes bfloat16 wrongly, which is compiled only.
"""

from __future__ import annotations

import random
import sys

import torch
from torch import Tensor

from blockwright.ir.ops.block_attention import reference
from blockwright.kernels.block_attention import Cut
from blockwright.kernels.block_attention_triton import Tiles, attend

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
CASES = 9


def main() -> None:
    torch.manual_seed(0)
    for number in range(CASES):
        check(random.Random(number))
    sys.stdout.write(f"{CASES} cases agree\n")


def check(draw: random.Random) -> None:
    kv_heads, batch = draw.choice((1, 2)), draw.choice((1, 2))
    heads, head_dim = kv_heads * draw.choice((1, 3)), draw.choice((8, 16, 20))
    value_dim = draw.choice((head_dim, 12))
    queries, keys = draw.randint(1, 40), draw.randint(1, 40)
    cut = Cut(draw.randint(1, 40), draw.randint(1, 40), 0.3, draw.random() < 0.3)
    dtype = draw.choice(tuple(TOLERANCE))
    many = -(-queries // cut.query_block), -(-keys // cut.key_block)
    shared = draw.choice((1, batch)), draw.choice((1, heads))
    blocks = torch.rand(*shared, *many).argsort(-1)[..., : draw.randint(0, many[1])]
    blocks = blocks.where(torch.rand(blocks.shape) > draw.choice((0.0, 0.3)), -1)

    def make(*shape: int) -> Tensor:
        rows = torch.randn(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
        return rows.to(dtype)

    q, k = make(batch, heads, queries, head_dim), make(batch, kv_heads, keys, head_dim)
    v = make(batch, kv_heads, keys, value_dim)
    results = attend(q, k, v, blocks, cut, Tiles(16, 16, 4, 1))
    expected = reference(q.double(), k.double(), v.double(), blocks, *cut)
    for value, right in zip(results, expected, strict=True):
        hidden = right.isinf()
        assert torch.equal(value.isinf(), hidden)
        error = (value.double() - right).masked_fill(hidden, 0.0).norm()
        assert error <= TOLERANCE[dtype] * right.masked_fill(hidden, 1.0).norm(), (cut, dtype)


if __name__ == "__main__":
    main()
