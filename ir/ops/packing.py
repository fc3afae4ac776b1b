"""Integer codes and how they are stored.

Codes of a weight are a matrix [in_features, out_features]. Eight-bit codes are stored as they are.
Four-bit codes are stored two to a byte over the flattened matrix, the first one in the low nibble:
byte for byte the layout of ONNX's INT4 and UINT4 tensors.
"""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

BITS: Final = (4, 8)


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and largest code. Symmetric ranges leave out the odd negative one."""
    if symmetric:
        return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def code_dtype(symmetric: bool) -> torch.dtype:
    """Return the type eight-bit codes are stored in."""
    return torch.int8 if symmetric else torch.uint8


def pack_nibbles(codes: Int[Tensor, "..."]) -> UInt8[Tensor, " bytes"]:
    """Store codes of four bits (-8..7 or 0..15) two to a byte; an odd last nibble is zero."""
    flat = codes.reshape(-1).to(torch.int16) & 0xF
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[0::2] | (flat[1::2] << 4)).to(torch.uint8)


def unpack_nibbles(
    packed: UInt8[Tensor, " bytes"], shape: tuple[int, ...], *, signed: bool
) -> Int[Tensor, "..."]:
    """Undo `pack_nibbles` for a known shape."""
    both = torch.stack([packed & 0xF, packed >> 4], dim=-1).reshape(-1)
    count = 1
    for size in shape:
        count *= size
    codes = both[:count].to(torch.int8)
    if signed:
        codes = torch.where(codes > 7, codes - 16, codes)
    return codes.reshape(shape)


def unpack(codes: Tensor, shape: tuple[int, ...], bits: int, *, signed: bool) -> Tensor:
    """Return stored codes as a matrix of one code per element."""
    return unpack_nibbles(codes, shape, signed=signed) if bits == 4 else codes.reshape(shape)


def dequantize(
    codes: Int[Tensor, "in_features out_features"],
    scale: Float[Tensor, "groups out_features"],
    zero_point: Int[Tensor, "groups out_features"] | None,
    group_size: int,
) -> Float[Tensor, "in_features out_features"]:
    """Return `(codes - zero_point) * scale`, each group of rows with its own scale."""
    rows = codes.shape[0]
    group = torch.arange(rows, device=codes.device) // group_size  # [in_features]
    values = codes.to(scale.dtype)
    if zero_point is not None:
        values = values - zero_point.to(scale.dtype)[group]
    return values * scale[group]
