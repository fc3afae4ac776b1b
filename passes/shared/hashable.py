"""Which layers can be read from tables, and which can be left out with them."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.recognize import FeedForward, Layer, Linear
from ...ir.recognize.activation import activation_of
from ...ir.recognize.calls import peel
from ...ir.recognize.readers import Readers


def cannot_hash(region: Readers | FeedForward, tau: int) -> str | None:
    """Say why layers cannot be read from tables, or None."""
    reason = _is_no_network(region) if isinstance(region, FeedForward) else None
    if reason:
        return reason
    layers: Sequence[Layer | Linear]
    layers = region.layers if isinstance(region, FeedForward) else region.linears
    if any(region.is_shared(layer.weight_node) for layer in layers if layer.weight_node):
        return "shares a weight with another place"
    if len({layer.weight.dtype for layer in layers}) > 1:
        return "mixes weight types"
    if activation_of(peel(region.inputs[0])):
        return "reads what an activation has left, whose signs say little"
    dim = layers[0].weight.shape[1]
    if dim % tau:
        return f"reads {dim} features, which chunks of tau={tau} do not divide"
    return None


def _is_no_network(ffn: FeedForward) -> str | None:
    reasons = {
        "mixes tokens, not channels": ffn.axis != "channels",
        "has convolutions among its neurons": bool(ffn.depthwise),
        "has packed weights": not ffn.is_dense,
        "shares a matrix with something else; canonicalize cuts it in two": ffn.shares_down,
        "reads or gives something besides": ffn.inputs != (ffn.x,) or ffn.outputs != (ffn.y,),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def cannot_remove(region: Readers) -> str | None:
    """Say why the layer behind an attention has to stay, or None."""
    layer, *others = region.linears
    out, dim = layer.weight.shape
    if others:
        return "is one of several layers that read the heads"
    return None if out == dim else f"makes {out} features of {dim}, so nothing else fits there"
