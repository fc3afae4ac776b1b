"""Weights and inputs from specs: every tensor from a seed of its own."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .configs import InputSpec, ModelConfig, WeightSpec

TEXT = 2  # length of the text stream of an `mmdit`


def weight(name: str, shape: Sequence[int], spec: WeightSpec, dtype: torch.dtype) -> Tensor:
    """Draw the weight of a name. Scales of norms are one on integers, tables of RoPE always fixed.

    Args:
        name: Path in the model.
        shape: Its shape; matrices are [out, in] whichever way they are stored.
        spec: How.
        dtype: Its type.
    """
    if name.endswith("inv_freq"):
        return (100.0 ** -(torch.arange(shape[0]) / shape[0])).to(dtype)
    if "norm" in name and spec.kind in ("ints", "grid", "zeros", "low_rank"):
        return torch.ones(*shape, dtype=dtype)
    generator = torch.Generator().manual_seed(spec.seed * 65_537 + zlib.crc32(name.encode()))
    if spec.kind == "ints":
        return torch.randint(-2, 3, tuple(shape), generator=generator).to(dtype)
    if spec.kind == "grid":
        drawn = torch.randint(-spec.levels, spec.levels + 1, tuple(shape), generator=generator)
        drawn[..., 0] = spec.levels
        return drawn.to(dtype)
    return _gaussian(shape, spec.kind, generator).to(dtype)


def _gaussian(shape: Sequence[int], kind: str, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])
    if kind == "outlier":
        drawn[..., -1] *= 50
    if kind == "low_rank" and len(shape) == 2:
        drawn = drawn[:, :1] * drawn[:1]
    return drawn * {"zeros": 0.0, "tiny": 2.0**-60, "huge": 2.0**8}.get(kind, 1.0)


def inputs_of(
    config: ModelConfig, spec: InputSpec, batch: int | None = None, seq: int | None = None
) -> dict[str, Tensor]:
    """Draw the inputs of a model by name.

    Args:
        config: The model.
        spec: How.
        batch: Batch size, as in the example when left out.
        seq: Sequence length, as in the example when left out.
    """
    batch, seq = batch or config.batch, seq or config.seq
    generator = torch.Generator().manual_seed(spec.seed)
    made: dict[str, Tensor] = {}
    for name, shape in input_shapes(config, batch, seq).items():
        if name == "x" and config.vocab:
            made[name] = torch.randint(0, config.vocab, shape, generator=generator)
        elif name == "mask":
            made[name] = _padding(batch, seq, spec.padding, generator)
        else:
            made[name] = _floats(shape, spec, generator).to(getattr(torch, config.dtype))
    return made


def input_shapes(config: ModelConfig, batch: Any, seq: Any) -> dict[str, tuple[Any, ...]]:
    """Return the shape of each input, in the order of `forward`."""
    shapes: dict[str, tuple[Any, ...]] = {
        "x": (batch, seq) if config.vocab else (batch, seq, config.dim)
    }
    if "padding" in config.masks():
        shapes["mask"] = (batch, seq)
    if "additive" in config.masks():
        shapes["bias"] = (batch, 1, seq, seq)
    if config.family == "mmdit":
        shapes["text"] = (batch, TEXT, config.dim)
    if config.family in ("dit", "mmdit"):
        shapes["cond"] = (batch, config.dim)
    return shapes


def _floats(shape: tuple[int, ...], spec: InputSpec, generator: torch.Generator) -> Tensor:
    wanted = shape[::-1] if spec.layout == "transposed" else shape
    if spec.kind == "ints":
        value = torch.randint(-2, 3, wanted, generator=generator).double()
    else:
        value = torch.randn(wanted, generator=generator)
    if spec.kind == "extreme":
        value = value * 10.0 ** torch.randint(-6, 7, wanted, generator=generator)
    if spec.layout == "expanded":
        return value[:1].expand(shape)
    return value.permute(*reversed(range(len(shape)))) if spec.layout == "transposed" else value


def _padding(batch: int, seq: int, kind: str, generator: torch.Generator) -> Tensor:
    """Return a mask [batch, seq], true where a key may be seen; every row sees one."""
    kept = torch.full((batch,), seq)
    if kind == "tail":
        kept = torch.randint(1, seq + 1, (batch,), generator=generator)
    if kind == "all_but_one":
        kept = torch.ones(batch)
    return torch.arange(seq) < kept[:, None]
