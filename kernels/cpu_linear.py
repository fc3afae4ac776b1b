"""Linear layers over integer codes, as fast as PyTorch has them on a CPU.

    folded    y = x @ weight                         weight = (codes - zero_point) * scale, in fp32
    bf16      y = bf16(x) @ weight                   codes stay packed, 4 or 8 bits each
    int8      y = (round(x / s) @ codes) * s * scale           s = max|x| / 127 of each row

Folding gives back the storage that codes save, and is what fp32 speed takes: the packed kernels
read bf16 only (with fp32 activations PyTorch falls back to a loop, 8 to 100 times slower). All of
it is inference only. Codes are plain matrices [in_features, out_features], one code per element.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Final

import torch
import torch.ao.quantization.fx._decomposed  # registers `quantized_decomposed`
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

INT4_GROUPS: Final = (32, 64, 128, 256)
UNSIGNED_ZERO: Final = 128
"""What is added to signed activation codes: x86 multiplies unsigned by signed bytes."""


class FoldedLinear(nn.Module):
    """`x @ weight + bias` with the weight that codes stand for, computed once."""

    folded: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "in_features out_features"],
        bias: Float[Tensor, " out_features"] | None,
    ) -> None:
        super().__init__()
        self.register_buffer("folded", weight.t().contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Tensor:
        return F.linear(x, self.folded, self.bias)


class FoldedWeight(nn.Module):
    """A weight that codes stand for, computed once."""

    folded: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("folded", weight)

    def forward(self) -> Tensor:
        return self.folded


class Bf16Int8Linear(nn.Module):
    """Eight-bit symmetric codes, one scale per output; activations, scale and sum round to bf16.

    That moves an output by about 0.4 % of its size.
    """

    packed: Tensor
    bf16_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Int8[Tensor, "in_features out_features"],
        scale: Float[Tensor, " out_features"],
        bias: Float[Tensor, " out_features"] | None,
    ) -> None:
        super().__init__()
        self.register_buffer("packed", codes.t().contiguous())
        self.register_buffer("bf16_scale", scale.to(torch.bfloat16))
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.bf16_scale)
        return _finish(y, x, self.bias)

    @staticmethod
    def fits(in_features: int, group_size: int, bits: int, *, symmetric: bool) -> bool:
        """Whether the kernel takes such codes; it reads 16 inputs at a time, unchecked."""
        return bits == 8 and symmetric and group_size >= in_features and in_features % 16 == 0


class Bf16Int4Linear(nn.Module):
    """Four-bit codes, a scale and a zero per group of inputs; rounds like `Bf16Int8Linear`."""

    packed: Tensor
    scale_and_zero: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Int[Tensor, "in_features out_features"],
        scale: Float[Tensor, "groups out_features"],
        zero_point: Int[Tensor, "groups out_features"] | None,
        bias: Float[Tensor, " out_features"] | None,
        group_size: int,
    ) -> None:
        super().__init__()
        # The kernel's weight is (unsigned code - 8) * scale + zero.
        unsigned = codes.to(torch.int32) + (8 if zero_point is None else 0)
        zero = torch.zeros_like(scale) if zero_point is None else (8 - zero_point) * scale
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.t().contiguous(), 1)
        self.register_buffer("packed", packed)
        self.register_buffer(
            "scale_and_zero", torch.stack([scale, zero], dim=-1).to(torch.bfloat16)
        )
        self.register_buffer("bias", bias)
        self.group_size = group_size

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.packed, self.group_size, self.scale_and_zero
        )
        return _finish(y, x, self.bias)

    @staticmethod
    def fits(in_features: int, out_features: int, group_size: int, bits: int) -> bool:
        """Whether the kernel takes such codes."""
        whole = in_features % group_size == 0 and out_features % 16 == 0
        return bits == 4 and group_size in INT4_GROUPS and whole


class RoundedLinear(nn.Module):
    """The int8 layer with its integers held as floats: quickest for a few rows.

    Sums are exact as long as in_features * 127 * 64 < 2**24, and round like any fp32 sum above.
    """

    weight_codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Int8[Tensor, "in_features out_features"],
        scale: Float[Tensor, " out_features"],
        bias: Float[Tensor, " out_features"] | None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight_codes", codes.t().to(torch.float32).contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Tensor:
        step = row_steps(x)
        total = F.linear(torch.round(x / step).to(torch.float32), self.weight_codes)
        y = total.to(x.dtype) * step * self.scale
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """Integer products in oneDNN, behind one op of ours: the way to run op by op.

    Sums are exact: codes within +-64 cannot saturate where two u8 x s8 products share 16 bits.
    """

    weight_codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Int8[Tensor, "in_features out_features"],
        scale: Float[Tensor, " out_features"],
        bias: Float[Tensor, " out_features"] | None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight_codes", codes.t().contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Tensor:
        return torch.ops.blockwright_cpu.int8_linear(x, self.weight_codes, self.scale, self.bias)


class CompiledInt8Linear(nn.Module):
    """The int8 layer in words a compiler reads.

    Inductor (with `freezing`) fuses the quantization with what comes before, packs the codes, and
    turns dequantize-dequantize-linear into the kernel of `Int8Linear`, called without Python. Where
    it does not, the same graph is an fp32 product with the same codes.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Int8[Tensor, "in_features out_features"],
        scale: Float[Tensor, " out_features"],
        bias: Float[Tensor, " out_features"] | None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight_codes", codes.t().contiguous())
        self.register_buffer("weight_scale", scale.to(torch.float32))
        self.register_buffer("weight_zero", torch.zeros(len(scale), dtype=torch.int64))
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Tensor:
        decomposed = torch.ops.quantized_decomposed
        step = row_steps(x)
        rows = (torch.round(x / step) + UNSIGNED_ZERO).to(torch.uint8)
        values = decomposed.dequantize_per_tensor.default(
            rows, 1.0, UNSIGNED_ZERO, 0, 255, torch.uint8
        )
        weight = decomposed.dequantize_per_channel.default(
            *(self.weight_codes, self.weight_scale, self.weight_zero), 0, -128, 127, torch.int8
        )
        y = F.linear(values, weight).to(x.dtype) * step
        return y if self.bias is None else y + self.bias


class QuantizedTable(nn.Module):
    """An embedding table of int8 codes, in plain ops."""

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Int8[Tensor, "vocab dim"], scale: Float[Tensor, "vocab 1"]) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Tensor:
        return F.embedding(ids, self.codes).to(self.scale.dtype) * F.embedding(ids, self.scale)


def row_steps(x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch 1"]:
    """Return the scale of each row, max|x| / 127; 1 for a row of zeros."""
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(step == 0, torch.ones_like(step), step)


def quantize_rows(
    x: Float[Tensor, "rows features"],
) -> tuple[Float[Tensor, "rows 1"], UInt8[Tensor, "rows features"]]:
    """Return the scale of each row and its codes plus 128, with few passes over memory."""
    step = torch.maximum(x.amax(dim=-1, keepdim=True), -x.amin(dim=-1, keepdim=True)) / 127
    step = torch.where(step == 0, torch.ones_like(step), step)
    return step, (x / step).round_().add_(UNSIGNED_ZERO).to(torch.uint8)


def int8_matmul(
    rows: UInt8[Tensor, "rows in_features"], codes: Int8[Tensor, "out_features in_features"]
) -> Float[Tensor, "rows out_features"]:
    """Return `(rows - 128) @ codes.T`: integer sums, given as floats."""
    one, zero = torch.ones(len(codes)), torch.zeros(len(codes), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        *(rows, 1.0, UNSIGNED_ZERO, _pack(codes), one, zero),
        *(None, 1.0, 0, torch.float32, "none", [], ""),
    )


# A packed weight is an opaque tensor that graphs, exporters and files cannot hold, so it is made at
# the first call and lives as long as the codes it was made from.
_packed: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()


def _pack(codes: Int8[Tensor, "out_features in_features"]) -> Tensor:
    packed = _packed.get(codes)
    if packed is None:
        packed = _packed[codes] = torch.ops.onednn.qlinear_prepack(codes, None)
    return packed


def _finish(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Give a product of rows the type and leading sizes of `x`, and add the bias."""
    y = y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


# `define` instead of `custom_op`: no autograd layer, a quarter of the cost per call. The namespace
# is not `blockwright`, so that files cannot ask for it: its arguments are trusted.
torch.library.define(
    "blockwright_cpu::int8_linear", "(Tensor x, Tensor codes, Tensor scale, Tensor? bias) -> Tensor"
)


@torch.library.impl("blockwright_cpu::int8_linear", "cpu")
def _int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    step, rows = quantize_rows(x.reshape(-1, x.shape[-1]))
    y = int8_matmul(rows, codes).to(x.dtype).mul_(step).mul_(scale)
    if bias is not None:
        y.add_(bias)
    return y.reshape(*x.shape[:-1], len(codes))


@torch.library.register_fake("blockwright_cpu::int8_linear")  # type: ignore[untyped-decorator]
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))
