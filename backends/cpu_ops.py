"""Put fast CPU modules where a program calls structural ops, for the backends that run PyTorch.

    quantized_linear       folded to fp32; packed bf16 kernels when asked and when they are faster
    int8_linear            integer products; integers as floats when the example has few rows
    quantized_embedding    plain lookups
    dequantize             folded
    moe_ffn                one matrix product per expert that is used
    hash_linear            one `embedding_bag` over all tables

Faithful by default: only `activations="bf16"` changes numbers beyond rounding. What has no faster
form (other devices, fp64, codes that would saturate) keeps the reference of its op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..ir.errors import OptionError
from ..ir.ops import OPS
from ..ir.ops.int8_linear import WEIGHT_LIMIT
from ..ir.ops.packing import unpack
from ..ir.ops.quantized_linear import weight_of
from ..ir.program import Program
from ..ir.recognize.structural import StructuralCall
from ..ir.regions import regions
from ..ir.rewrite import rewrite
from ..ir.shapes import concrete
from ..kernels.cpu_linear import (
    Bf16Int4Linear,
    Bf16Int8Linear,
    CompiledInt8Linear,
    FoldedLinear,
    FoldedWeight,
    Int8Linear,
    QuantizedTable,
    RoundedLinear,
)
from ..kernels.experts import Experts
from ..kernels.hash_cpu import HashedTables
from ..kernels.moe_cpu import SortedExperts

INT8_ROWS: Final = 16
"""Fewer rows than these run faster as floats: oneDNN takes some 50 microseconds a call."""

BF16_ROWS: Final = {("AVX512", 8): 16, ("AVX512", 4): 64, ("AVX2", 8): 1}
"""Up to how many rows a packed bf16 kernel beats fp32, by instruction set and bits; else never."""

BF16_WEIGHTS: Final = 2**20
"""Layers of fewer weights stay in the cache, where packing saves no time."""

_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


def lower_structural(
    program: Program, options: Mapping[str, Any], *, compiled: bool = False
) -> Program:
    """Return a program in which structural ops run fast on a CPU.

    Args:
        program: Any program. Kernels are chosen for the sizes of its example inputs.
        options: `activations`: `fp32` (default), or `bf16` to let weight-only layers round
            activations, scales and sums to bf16 where that is faster.
        compiled: A compiler reads the result, so spell int8 layers in ops it can fuse.

    Raises:
        OptionError: `activations` is neither.
    """
    activations = options.get("activations", "fp32")
    if activations not in ("fp32", "bf16"):
        raise OptionError(f"activations={activations!r} is unknown.", remedy="use fp32 or bf16.")
    program, size = _folded(program), concrete(program, None)
    replacements: list[tuple[StructuralCall, nn.Module]] = []
    for call in regions(program, StructuralCall):
        rows = math.prod(size(n) for n in call.input.shape[:-1])
        module = _module(call, rows, bf16=activations == "bf16", compiled=compiled)
        if module is not None:
            replacements.append((call, module))
    return rewrite(program, replacements, by="cpu-ops") if replacements else program


def _folded(program: Program) -> Program:
    """Return a program in which weights that calls make of codes alone are stored as floats."""
    calls = [call for call in regions(program, StructuralCall) if not call.inputs]
    modules = [FoldedWeight(OPS[call.op].overload(**call.arguments())) for call in calls]
    pairs = list(zip(calls, modules, strict=True))
    return rewrite(program, pairs, by="cpu-ops") if pairs else program


def _module(call: StructuralCall, rows: int, *, bf16: bool, compiled: bool) -> nn.Module | None:
    """Return what stands in for a call, or None to leave it."""
    arguments = call.arguments()
    if any(isinstance(t, Tensor) and t.device.type != "cpu" for t in arguments.values()):
        return None
    name = call.op.split(".")[1]
    if name == "quantized_embedding":
        return QuantizedTable(**arguments)
    if name == "quantized_linear":
        return _weight_only(call.input, arguments, rows, bf16=bf16)
    if name == "moe_ffn":
        return SortedExperts(Experts(**arguments))
    if name == "hash_linear":
        return HashedTables(**arguments)
    if name == "int8_linear" and call.input.dtype in _FLOATS and _in_range(arguments["codes"]):
        form = _int8_form(rows, compiled=compiled)
        return form(**arguments)
    return None


def _int8_form(rows: int, *, compiled: bool) -> Callable[..., nn.Module]:
    if rows < INT8_ROWS or not torch.backends.mkldnn.is_available():
        return RoundedLinear
    return CompiledInt8Linear if compiled else Int8Linear


def _weight_only(x: Tensor, arguments: dict[str, Any], rows: int, *, bf16: bool) -> nn.Module:
    features = int(x.shape[-1])
    codes, scale, zero_point = (arguments[n] for n in ("codes", "scale", "zero_point"))
    bits, group_size, bias = (arguments[n] for n in ("bits", "group_size", "bias"))
    if bf16 and x.dtype == torch.float32 and rows <= _bf16_rows(bits, features * scale.shape[1]):
        symmetric = zero_point is None
        matrix = unpack(codes, (features, scale.shape[1]), bits, signed=symmetric)
        if Bf16Int8Linear.fits(features, group_size, bits, symmetric=symmetric):
            return Bf16Int8Linear(matrix, scale[0], bias)
        if Bf16Int4Linear.fits(features, scale.shape[1], group_size, bits):
            zeros = None if symmetric else unpack(zero_point, tuple(scale.shape), 4, signed=False)
            return Bf16Int4Linear(matrix, scale, zeros, bias, group_size)
    weight = weight_of(features, codes, scale, zero_point, bits, group_size)
    return FoldedLinear(weight.to(x.dtype), bias)


def _bf16_rows(bits: int, weights: int) -> int:
    """Return up to how many rows to use a packed kernel on this CPU."""
    if weights < BF16_WEIGHTS:
        return 0
    capability = torch.backends.cpu.get_cpu_capability()
    return BF16_ROWS.get((capability.split("_")[0], bits), 0)


def _in_range(codes: Tensor) -> bool:
    """Whether 16-bit sums of two products cannot saturate; no weight at all is left alone too."""
    return (
        codes.numel() > 0 and int(codes.max()) <= WEIGHT_LIMIT and int(codes.min()) >= -WEIGHT_LIMIT
    )
