"""Inputs made smaller and weights larger where inputs are large, before weights are rounded.

    y = x @ W = (x / s) @ (s * W)          s = mean|x| ** power, about 1 in all

Large inputs make the errors of their weights count; a weight that is multiplied by s before it is
rounded is off by 1 / s of that. The power is the best of a few on the calibration, 0 among them.

Source: Lin et al., AWQ, 2024, arXiv:2306.00978 (section 3.2).
Differs: the error of a layer comes from second moments of its inputs, and ranges are not clipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ...ir.recognize import Linear, Norm
from ...ir.recognize.flow import flow_of
from .codes import Codes, Grid, rounded
from .moments import Moments

POWERS = 20  # powers tried, from 0 up to 1
_LEAST = 1e-4  # of the largest input: smaller ones are taken for as large


def scales_of(
    layers: Sequence[tuple[Float[Tensor, "in_features _"], Codes]], moments: Moments
) -> Float[Tensor, " in_features"]:
    """Return what to multiply the weights of each input by, in layers that read the same value.

    Args:
        layers: Their weights, as columns, and how these are stored.
        moments: Of what they read.
    """
    size = moments.size / moments.size.max().clamp_min(torch.finfo(torch.float64).tiny)

    def error(scales: Tensor) -> float:
        return sum(moments.error(_changed(w, scales[:, None], codes)) for w, codes in layers)

    tried = [_centred(size.clamp_min(_LEAST) ** (step / POWERS)) for step in range(POWERS)]
    return min(tried, key=error)


def _changed(columns: Tensor, by: Tensor, codes: Codes) -> Tensor:
    """Return how far weights are off that were rounded when they were `by` times as large."""
    grid = Grid.around(columns * by, *codes.how)
    values = grid.values(rounded(columns * by, grid), grid.groups(len(columns)))
    return values / by - columns


def _centred(scales: Tensor) -> Tensor:
    return (scales / (scales.max() * scales.min()).sqrt()).float()


def folds_into(layers: Sequence[Linear]) -> Norm | None:
    """Return the norm whose scale and shift can be divided, if these layers alone read its result.

    Args:
        layers: All that read one value and are to be scaled alike.
    """
    value, first = layers[0].inputs[0], layers[0]
    norm = flow_of(value.graph).norm_to.get(value) if value.op == "call_function" else None
    if norm is None or norm.weight_node is None or norm.form == "group_norm":
        return None
    slots = [slot for slot in (norm.weight_node, norm.bias_node) if slot is not None]
    alone = set(value.users) == {node for layer in layers for node in layer.nodes}
    if not alone or any(first.is_shared(slot) for slot in slots):
        return None
    bound: Norm = norm.bind(first.program, first.graph, first.instance)
    return bound
