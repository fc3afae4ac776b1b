"""MemoryFormer: published sizes, the layer spelled out, what a block is, that it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockwright as bw
from blockwright.ir.capture import capture
from blockwright.models import memoryformer
from blockwright.models.memoryformer import (
    MemoryFormer,
    MemoryFormerConfig,
    MemoryLayer,
    rotate_part,
)

TOY = memoryformer.TOY
# Tables of a block, checked against the configurations that were released.
TABLES = [
    (memoryformer.MEMORYFORMER_TINY, 69_206_016),
    (memoryformer.MEMORYFORMER_SMALL, 155_713_536),
    (memoryformer.MEMORYFORMER_BASE, 276_824_064),
]


def drawn(config: MemoryFormerConfig) -> Any:
    torch.manual_seed(0)
    return MemoryFormer(config).eval()


@pytest.mark.parametrize(("config", "tables"), TABLES)
def test_sizes_follow_the_closed_form(config: MemoryFormerConfig, tables: int) -> None:
    with torch.device("meta"):
        model = MemoryFormer(config)
    dim, count = config.dim, config.dim // config.bits
    rows, hidden = 2**config.bits, count * (config.bits + 2)
    assert tables == 3 * count * rows * dim + count * rows * hidden + count * 4 * rows * dim
    assert tables == 22 * 12 * dim**2
    stored = {name: p.numel() for name, p in model.blocks[0].named_parameters()}
    assert sum(size for name, size in stored.items() if name.endswith("tables")) == tables
    block = tables + (3 * dim + hidden + dim) + (2 * dim + 2 * hidden)  # biases, norms
    assert sum(stored.values()) == block
    whole = config.depth * block + 2 * config.vocab * dim + dim
    assert sum(p.numel() for p in model.parameters()) == whole


def test_twice_as_many_tables_are_as_many_rows_of_another_kind() -> None:
    wide = replace(TOY, widen="tables")
    shapes = {n: tuple(p.shape) for n, p in drawn(wide).blocks[0].named_parameters()}
    assert shapes["first.tables"] == (4, 16, 32)
    assert shapes["second.tables"] == (8, 16, 16)
    assert wide.hidden == (32, 4)
    assert TOY.hidden == (24, 6)


def spelled(layer: MemoryLayer, x: Tensor) -> Tensor:
    """The layer in PyTorch's own ops."""
    count, rows, _ = layer.tables.shape
    z = x.unflatten(-1, (count, -1))
    signs = (z >= 0).long() * 2 ** torch.arange(z.shape[-1]).flip(0)
    place = signs.sum(-1) + rows * torch.arange(count)
    weight = z.abs().sum(-1) / (1 + torch.exp(-2 * z.abs())).prod(-1)
    y = F.embedding_bag(
        place.flatten(0, -2), layer.tables.flatten(0, 1), mode="sum",
        per_sample_weights=weight.flatten(0, -2),
    )  # fmt: skip
    return y.unflatten(0, x.shape[:-1]) + layer.bias


def test_a_block_spelled_out() -> None:
    model = drawn(TOY)
    block, x = model.blocks[0], torch.randn(2, 5, 16)
    angles = torch.arange(5)[:, None] * torch.ones(1, 1)
    rotary = angles.cos(), angles.sin()
    q, k, v = spelled(block.attention.qkv, block.attention_norm(x)).split(16, dim=-1)
    q, k, v = (t.view(2, 5, 2, 8).transpose(1, 2) for t in (q, k, v))
    q, k = rotate_part(q, rotary), rotate_part(k, rotary)
    mask = torch.full((5, 5), -torch.inf).triu(1)
    y = (q @ k.transpose(-2, -1) / 8**0.5 + mask).softmax(-1) @ v
    h = x + y.transpose(1, 2).reshape(2, 5, 16)
    inner = block.middle_norm(spelled(block.first, block.ffn_norm(h)))
    torch.testing.assert_close(block(x, rotary), h + spelled(block.second, inner))


def test_a_quarter_of_each_head_is_rotated() -> None:
    x, angles = torch.randn(1, 2, 3, 8), torch.full((3, 1), torch.pi / 2)
    y = rotate_part(x, (angles.cos(), angles.sin()))
    assert torch.equal(y[..., 2:], x[..., 2:])
    torch.testing.assert_close(y[..., 0], -x[..., 1])
    torch.testing.assert_close(y[..., 1], x[..., 0])


def test_what_lies_ahead_is_not_seen() -> None:
    model, tokens = drawn(TOY), torch.randint(0, 32, (1, 16))
    other = tokens.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 32
    a, b = model(tokens), model(other)
    torch.testing.assert_close(a[:, :9], b[:, :9])
    assert not torch.allclose(a[:, 9:], b[:, 9:])


def test_it_learns() -> None:
    model = drawn(TOY).train()
    tokens = torch.arange(17).expand(4, -1) % 5
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_all_of_it_is_recognised() -> None:
    model = drawn(TOY)
    program = capture(model, model.example_inputs())
    assert program.explain().inside() == (1.0, 1.0)
    assert [a.heads for a in program.attentions()] == [2, 2, 2]
    assert len(program.blocks()) == 3
    assert len(program.instances) == 3
    cost, tokens = program.cost(), 2 * 16
    rows = 3 * (4 * (48 + 24 + 16) * tokens) + tokens * 32 * 16
    assert cost.by_kind["linear"] == 2 * rows


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
def test_engines_compute_what_the_module_does(backend: str, tmp_path: Path) -> None:
    model: nn.Module = drawn(replace(TOY, depth=1))
    inputs = model.example_inputs()  # type: ignore[operator]
    engine = bw.compile(model, (), inputs, backend=backend)
    torch.testing.assert_close(engine(*inputs), model(*inputs), atol=1e-5, rtol=1e-4)
    engine.save(tmp_path / "memory.bw")
    again = bw.load(tmp_path / "memory.bw")
    torch.testing.assert_close(again(*inputs), engine(*inputs))
