"""The Triton kernel of hashed tables: right in the interpreter, compiled for GPUs not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from blockwright.kernels.hash_triton import Blocks, blocks_for, lookup_kernel

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
ALIGNED = [["tt.divisibility", 16]]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may use


def test_the_interpreter_agrees_with_the_reference() -> None:
    script = Path(__file__).with_name("interpret_hash.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "9 cases agree"


@pytest.mark.parametrize(
    ("dtype", "capability", "bits", "tokens"),
    [
        (torch.bfloat16, 90, 8, 4096),
        pytest.param(torch.float32, 80, 8, 1, marks=pytest.mark.slow),
        pytest.param(torch.float16, 80, 10, 4096, marks=pytest.mark.slow),
        pytest.param(torch.float32, 90, 10, 1, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_compiles(
    dtype: torch.dtype,
    capability: int,
    bits: int,
    tokens: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    blocks: Blocks = blocks_for(tokens, 1536)
    width = 8 if bits == 8 else 16
    constants = {"BITS": bits, "WIDTH": width, "L1": True}
    constants |= {"BLOCK_T": blocks.tables, "BLOCK_N": blocks.n}
    names = lookup_kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else
        "i32" if name in ("count", "features", "columns") else POINTERS[dtype]
        for name in names
    }  # fmt: skip
    aligned = {(p,): ALIGNED for p, n in enumerate(names) if signature[n] in POINTERS.values()}
    aligned[names.index("features"),] = ALIGNED
    source = ASTSource(lookup_kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    binary = compile(source, target=target, options={"num_warps": blocks.warps})
    assert binary.asm["cubin"]
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    assert binary.metadata.global_scratch_size == 0
    assert "ld.global.v" in binary.asm["ptx"], "rows are read several elements at a time"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", POINTERS)
@pytest.mark.parametrize(("tokens", "features"), [(1, 96), (70, 500), (2000, 768)])
def test_a_gpu_agrees_with_the_reference(dtype: torch.dtype, tokens: int, features: int) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(tokens, 96), torch.randn(features)
    tables = torch.randn(12, 256, features)
    near = [t.to("cuda", dtype) for t in (x, tables, bias)]
    y = torch.ops.blockwright.hash_linear(*near, "l1_softmax")
    expected = torch.ops.blockwright.hash_linear(*(t.double() for t in near), "l1_softmax")
    assert (y - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()
