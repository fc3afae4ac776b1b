"""Triton kernel of block attention: right in the interpreter, and compiled for GPUs not here."""

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

from blockwright.ir.ops.block_attention import reference
from blockwright.kernels.block_attention import Cut
from blockwright.kernels.block_attention_triton import attend_kernel, constants, tiles_for

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TENSORS = ("q", "k", "v", "out")
ALIGNED = [["tt.divisibility", 16]]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may use
CUT = Cut(64, 64, 0.125, causal=False)


def test_the_interpreter_agrees_with_the_reference() -> None:
    script = Path(__file__).with_name("interpret_block_attention.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "9 cases agree"


def compiled(dtype: torch.dtype, head_dim: int, capability: int, cut: Cut) -> Any:
    """Compile as a call with aligned tensors would."""
    q, tiles = torch.empty(1, 1, 1, head_dim, dtype=dtype), tiles_for(dtype, head_dim, cut)
    known = constants(q, q, cut, tiles)
    signature, attributes = {}, {}
    for place, name in enumerate(attend_kernel.arg_names):
        if name in known:
            signature[name] = "constexpr"
        elif name in TENSORS:
            signature[name] = POINTERS[dtype]
        else:
            kinds = {"blocks": "*i32", "counts": "*i32", "lse": "*fp32", "scale": "fp32"}
            signature[name] = kinds.get(name, "i32")
        if name in TENSORS or name.endswith("_row"):
            attributes[place,] = ALIGNED
    source = ASTSource(attend_kernel, signature=signature, constexprs=known, attrs=attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (torch.bfloat16, 64),
        *(
            pytest.param(dtype, width, marks=pytest.mark.slow)
            for dtype in POINTERS
            for width in (32, 72, 128, 256)
        ),
    ],
)
def test_it_compiles_for_gpus(
    dtype: torch.dtype,
    head_dim: int,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    binary = compiled(dtype, head_dim, capability, CUT)
    assert binary.asm["cubin"]
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    assert binary.metadata.global_scratch_size == 0
    if dtype != torch.float32:
        assert ("wgmma" if capability == 90 else "mma.sync") in binary.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", POINTERS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 1000), (128, 4096), (80, 130), (256, 300)])
def test_a_gpu_agrees_with_the_reference(
    dtype: torch.dtype, causal: bool, head_dim: int, tokens: int
) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, tokens, heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
        for heads in (4, 2, 2)
    )
    many = -(-tokens // 64)
    blocks = torch.rand(2, 4, many, many, device="cuda").argsort(-1)[..., : max(1, many // 4)]
    cut = (64, 64, head_dim**-0.5, causal)
    found = torch.ops.blockwright.block_attention(q, k, v, blocks, *cut)
    expected = reference(q.double(), k.double(), v.double(), blocks, *cut)
    for value, right in zip(found, expected, strict=True):
        hidden = right.isinf()
        error = (value.double() - right).masked_fill(hidden, 0.0).norm()
        assert torch.equal(value.isinf(), hidden)
        assert error < 8 * torch.finfo(dtype).eps * right.masked_fill(hidden, 1.0).norm()
