"""Triton kernels of experts: right in the interpreter, and compiled for a GPU that is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from blockwright.kernels import moe_triton
from blockwright.kernels.moe_triton import Blocks, blocks_for, tiles_of

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TABLES = ("owners", "starts", "stops", "order")
COUNTS = ("k", "experts", "dim", "ffn_dim", "tiles")
ALIGNED = [["tt.divisibility", 16]]
SHARED_MEMORY = 227 * 1024  # bytes a program may use on sm_90


def test_the_interpreter_agrees_with_the_reference() -> None:
    script = Path(__file__).with_name("interpret_moe.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "12 cases agree"


@pytest.mark.parametrize("block", [1, 4, 16])
def test_tiles_cover_every_visit_once(block: int) -> None:
    torch.manual_seed(0)
    index = torch.rand(23, 5).topk(2, dim=-1).indices
    index[index == 3] = 4  # somebody is not visited
    tiles = tiles_of(index, 5, block)
    seen = []
    for expert, start, stop in zip(tiles.expert, tiles.start, tiles.stop, strict=True):
        if expert < 5:
            rows = range(int(start), min(int(start) + block, int(stop)))
            assert rows
            assert all(index.reshape(-1)[tiles.order[row]] == expert for row in rows)
            seen.extend(rows)
    assert sorted(seen) == list(range(46))


def compiled(kernel: Any, dtype: torch.dtype, blocks: Blocks, *, gated: bool) -> Any:
    """Compile for an H100, as a call with aligned tensors and biases would."""
    constants = blocks.constants(dtype) | {"KIND": "gelu_tanh"}
    if not gated:
        constants |= {"gate": None, "gate_bias": None}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name in COUNTS else "*i32" if name in TABLES else POINTERS[dtype]
        if name not in ("k", "experts", "tiles"):
            attributes[place,] = ALIGNED
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("gated", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("visits", [pytest.param(24, marks=pytest.mark.slow), 16384])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        pytest.param(torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.float32, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_hopper(
    dtype: torch.dtype, visits: int, gated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    blocks = blocks_for(dtype, visits, 12)
    for kernel in (moe_triton.hidden_kernel, moe_triton.answer_kernel):
        binary = compiled(kernel, dtype, blocks, gated=gated)
        assert binary.asm["cubin"]
        assert binary.metadata.shared <= SHARED_MEMORY
        assert binary.metadata.global_scratch_size == 0
        if dtype != torch.float32 and blocks.m >= 64:
            assert "wgmma" in binary.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", POINTERS)
@pytest.mark.parametrize("tokens", [1, 70, 1000])
def test_a_gpu_agrees_with_the_reference(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    index = torch.rand(tokens, 12).topk(2, dim=-1).indices
    shapes = ((tokens, 96), (tokens, 2), (12, 80, 96), (12, 80, 96), (12, 96, 80))
    x, weight, gate, up, down = (torch.randn(s) / s[-1] ** 0.5 for s in shapes)
    given = [x, index, weight, gate, up, None, None, down, None]
    near = [t if t is None or t is index else t.to("cuda", dtype) for t in given]
    near[1] = index.cuda()
    exact = [t if t is None or t.dtype == torch.int64 else t.double() for t in near]
    y = torch.ops.blockwright.moe_ffn(*near, "silu")
    expected = torch.ops.blockwright.moe_ffn(*exact, "silu")
    assert (y - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()
