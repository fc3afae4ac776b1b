"""Attention over listed blocks on every backend: numbers of the reference, at any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import blockwright as bw
from blockwright.backends.onnxruntime import OnnxRuntimeBackend
from blockwright.ir.capture import capture
from blockwright.ir.ops.block_attention import reference
from blockwright.ir.run import run

QUERY_BLOCK, KEY_BLOCK = 4, 3


class Listed(nn.Module):
    """Attention over blocks that are given from outside."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.options = (QUERY_BLOCK, KEY_BLOCK, 0.4, causal)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = torch.ops.blockwright.block_attention(
            q, k, v, blocks, *self.options
        )
        return out


def inputs(batch: int, queries: int, keys: int, *, kept: int = 2) -> tuple[Tensor, ...]:
    """Two query heads per key head, blocks of each its own, some of them none."""
    generator = torch.Generator().manual_seed(queries)

    def make(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    many = -(-queries // QUERY_BLOCK), -(-keys // KEY_BLOCK)
    order = torch.rand(batch, 4, *many, generator=generator).argsort(-1)[..., :kept]
    blocks = order.where(torch.rand(order.shape, generator=generator) > 0.2, -1)
    return make(4, queries, 8), make(2, keys, 8), make(2, keys, 6), blocks


def agrees(call: Callable[..., list[Tensor]], given: tuple[Tensor, ...], *, causal: bool) -> None:
    wide = (t.double() for t in given[:3])
    expected = reference(*wide, given[3], QUERY_BLOCK, KEY_BLOCK, 0.4, causal)
    for value, right in zip(call(list(given)), expected, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_onnx_runtime_at_any_size(causal: bool) -> None:
    model, given = Listed(causal=causal), inputs(2, 11, 10)
    batch, tokens = Dim("batch", min=1, max=8), (Dim("rows", max=64), Dim("keys", max=64))
    shapes = tuple({0: batch, 2: tokens[place > 0]} for place in range(3))
    shapes += ({0: batch, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)  # type: ignore[assignment]
    program = capture(model, given, dynamic_shapes=shapes)
    call = OnnxRuntimeBackend().lower(program, {"threads": 1}).run
    for sizes in ((2, 11, 10), (1, 8, 9), (3, 5, 17)):
        agrees(call, inputs(*sizes), causal=causal)
    agrees(call, inputs(2, 11, 10, kept=1), causal=causal)


@pytest.mark.parametrize("sizes", [(2, 8, 9), pytest.param((1, 7, 10), marks=pytest.mark.slow)])
def test_onnx_runtime_at_fixed_sizes(sizes: tuple[int, int, int]) -> None:
    given = inputs(*sizes)
    program = capture(Listed(), given)
    agrees(OnnxRuntimeBackend().lower(program, {"threads": 1}).run, given, causal=False)


def test_onnx_multiplies_what_is_listed_only() -> None:
    """Keys that nobody lists may be anything; masked, they would spoil every result."""
    q, k, v, _ = inputs(1, 8, 9)
    k[..., 3:6, :] = v[..., 3:6, :] = torch.nan
    given = (q, k, v, torch.tensor([0, 2]).expand(1, 4, 2, 2).contiguous())
    program = capture(Listed(), given)
    found = OnnxRuntimeBackend().lower(program, {"threads": 1}).run(list(given))
    assert all(value.isfinite().all() for value in (*found, *run(program, given)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["eager", "inductor", "onnxruntime"])
def test_engines_come_back_from_files(backend: str, tmp_path: Path) -> None:
    given = inputs(2, 11, 10)
    engine = bw.compile(Listed(), [], given, backend=backend, options={"threads": 1})
    engine.save(tmp_path / "listed.bw")
    loaded = bw.load(tmp_path / "listed.bw", trust=True)
    for each in (engine, loaded):
        agrees(lambda values, each=each: list(each(*values)), given, causal=False)
