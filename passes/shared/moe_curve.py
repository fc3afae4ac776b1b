"""How far experts are from the dense network they were, expert by expert: error(k)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ...ir.program import Program
from ...ir.recognize import FeedForward
from ...ir.recognize.place import Place
from ...ir.taps import tapped
from .moe import Gating, Split, mean_keys, stacked, visit
from .neurons import Neurons

ROWS = 256  # tokens per network that are looked at


def inputs_of(
    program: Program, ffns: Sequence[FeedForward], calibration: Iterable[Sequence[Tensor]]
) -> dict[str, Float[Tensor, "rows dim"]]:
    """Return the first `ROWS` tokens each network reads, by its label; none without calibration."""
    if not ffns:
        return {}
    taps = tapped(program, [Place(ffn.instance, ffn.x) for ffn in ffns])
    found: dict[str, Tensor] = {}
    for flat in calibration:
        with torch.no_grad():
            values = taps(*flat)
        for ffn, value in zip(ffns, values, strict=True):
            rows = value.flatten(0, -2)[:ROWS].clone()
            known = found.get(ffn.label)
            found[ffn.label] = rows if known is None else torch.cat((known, rows))[:ROWS]
        if all(len(rows) >= ROWS for rows in found.values()):
            break
    return found


def examined(neurons: Neurons, split: Split, x: Float[Tensor, "rows dim"] | None) -> Split:
    """Return a split with its errors, and the experts nobody visits, on sampled inputs."""
    if x is None or not split.experts:
        return split
    experts = [neurons.take(part) for part in split.experts]
    logits = F.linear(x, mean_keys(experts))
    used = Gating(split.active)(logits)[0].unique().numel()
    count = len(experts)
    powers = [2**power for power in range(count.bit_length())]
    steps = sorted({0, split.active, count, *(k for k in powers if k < count)})
    dense, shared, parts = neurons(x), neurons.take(split.shared)(x), stacked(experts)
    errors = [
        (k, _apart(shared + visit(x, *Gating(k)(logits), parts, neurons.activation), dense))
        for k in steps
    ]
    unused = count - used if split.active else 0
    return replace(split, unused=unused, errors=errors)


def _apart(y: Tensor, dense: Tensor) -> float:
    """Return the error relative to the dense network; 0 for nothing of nothing."""
    norm = dense.norm().item()
    error = (y - dense).norm().item()
    return error / norm if norm else error
