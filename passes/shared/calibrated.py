"""Weights of quantized layers that follow from what the layers read on the calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...ir.errors import OptionError
from ...ir.recognize import Linear
from .awq import folds_into, scales_of
from .codes import Codes, Grid, quantize, rounded
from .gptq import gptq
from .moments import Moments

Layers = Sequence[tuple[Linear, Codes]]


def gptq_codes(layers: Layers, moments: Mapping[str, Moments], **options: Any) -> dict[str, Tensor]:
    """Return the codes that GPTQ finds, where they err less than rounding to nearest.

    Args:
        layers: Layers of the old program, and how their weights are stored.
        moments: Of what they read, by label; a layer without stays as it is.
        options: As in `gptq.gptq`.
    """
    found: dict[str, Tensor] = {}
    for layer, codes in layers:
        if layer.label not in moments:
            continue
        seen, columns = moments[layer.label], layer.weight.t().float().cpu()
        grid = Grid.around(columns, *codes.how)
        better = gptq(columns, seen.second, grid, **options)
        if _error(better, columns, grid, seen) < _error(
            rounded(columns, grid), columns, grid, seen
        ):
            found[f"{layer.label}.codes"] = grid.stored(better).codes
    return found


def _error(codes: Tensor, columns: Tensor, grid: Grid, moments: Moments) -> float:
    return moments.error(grid.values(codes, grid.groups(len(columns))) - columns)


def awq_weights(layers: Layers, moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Return codes and scales of weights that grew with their inputs, and what takes that back.

    Arguments as in `gptq_codes`.
    """
    found: dict[str, Tensor] = {}
    for group in together(layers):
        first, how = group[0]
        if first.label not in moments or how.smoothing is None:
            continue
        columns = [(layer.weight.t().float().cpu(), codes) for layer, codes in group]
        scales = scales_of(columns, moments[first.label])
        for (layer, _), (own, codes) in zip(group, columns, strict=True):
            stored = quantize((own * scales[:, None]).t(), *codes.how)
            named = {f"{layer.label}.{name}": t for name, t in stored._asdict().items()}
            found |= {name: tensor for name, tensor in named.items() if tensor is not None}
            if how.smoothing == "factor":
                found[f"{layer.label}.factor"] = (1 / scales).to(layer.weight.dtype)
        if how.smoothing == "norm":
            found |= _folded([layer for layer, _ in group], scales)
    return found


def _folded(layers: Sequence[Linear], scales: Tensor) -> dict[str, Tensor]:
    """Return scale and shift of the norm before layers, divided."""
    norm = folds_into(layers)
    if norm is None:
        raise OptionError(
            "its inputs come from no norm that scales for it alone.",
            where=layers[0].label,
            remedy="let the plan say smoothing=factor.",
        )
    slots = [slot for slot in (norm.weight_node, norm.bias_node) if slot is not None]
    held = {norm.tensor_name(slot): norm.tensor(slot) for slot in slots}
    return {name: (t.cpu().float() / scales).to(t.dtype) for name, t in held.items()}


def together(layers: Layers) -> Iterator[list[tuple[Linear, Codes]]]:
    """Yield layers that read the same value, together."""
    groups: dict[object, list[tuple[Linear, Codes]]] = {}
    for layer, codes in layers:
        groups.setdefault((layer.instance, layer.inputs[0]), []).append((layer, codes))
    yield from groups.values()
