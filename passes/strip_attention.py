"""Attend with thin queries to the cells of a token grid, instead of to its tokens.

    y = softmax(q @ k.T) @ v                  q, k: [seq, head_dim]     v: [seq, value_dim]
->  y = softmax(q' @ k'.T + log n) @ v'       q': [seq, c], k': [seq / r^2, c]

A cell is the mean of r x r tokens at first, a depth-wise convolution once trained, and n is how
many tokens it has. Thin queries and keys are the best low rank of their product, head by head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Attention
from ..ir.recognize.layer import Layer
from .base import Pass, Plan, Promise, Skip, require_choice, selected
from .shared.cores import counts, no_core, trained_back
from .shared.recovery import Stage
from .shared.strips import Affine, Strip, Strips, StripWeights, drawn, square, thin

OWN = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight", "value.bias",
       "out.weight", "out.bias", "reduce", "norm.weight", "norm.bias", "local")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StripAttention(Pass[Attention, Strip]):
    """Reduce keys and values to cells of a token grid, and queries and keys to few channels.

    Attributes:
        reduce: r: a key stands for r x r tokens.
        qk_channels: Channels of a query and a key head; heads that have fewer keep theirs.
        grid: Rows and columns of tokens, rows first; None for a square, with one token before it
            or none.
        start: Thin projections are the best low rank (`svd`), or `random`.
        kv_norm: Normalise the cells. Not what the attention was, before training.
        local: Add a depth-wise 3 x 3 convolution, zero before training: with one channel, scores
            cannot tell near tokens from far ones.
        seed: Draws random projections.
        epochs: Times the calibration is gone through when attentions are trained back.
        rate: Largest learning rate of that training.
        include: Glob patterns of attentions to replace.
        exclude: Glob patterns of attentions to leave alone.

    Raises:
        OptionError: An option is out of range.

    Source: Xu et al., S2AFormer, 2025, arXiv:2505.22195; no code is published, so channels, order
        and start are reconstructions.
    Differs: replaces attentions of a trained model; keys are weighed by the tokens they stand for,
        so that cells at the edge and class tokens count for what they are.
    Exact when: `qk_channels` is at least that of a head, and `reduce` is 1 or tokens are equal
        within each cell; with no `kv_norm`.
    """

    name: ClassVar[str] = "strip-attention"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must factor"}
    reduce: int = 2
    qk_channels: int = 1
    grid: tuple[int, int] | None = None
    start: str = "svd"
    kv_norm: bool = False
    local: bool = True
    seed: int = 0
    epochs: int = 1
    rate: float = 1e-3
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "start", self.start, ("svd", "random"))
        if min(self.reduce, self.qk_channels, self.epochs) < 1 or self.rate <= 0:
            raise OptionError(
                f"{self.name}: reduce={self.reduce}, qk_channels={self.qk_channels},"
                f" epochs={self.epochs}, rate={self.rate}.",
                remedy="use one or more of each, and a positive rate.",
            )
        if self.grid is not None and min(self.grid) < 1:
            raise OptionError(f"{self.name}: grid={list(self.grid)} has no tokens.")

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def decide(self, attention: Attention) -> Strip | Skip:
        if not selected(attention.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=attention)
        reason = no_core(attention) or cannot_thin(attention)
        if reason:
            return Skip(reason, at=attention)
        strip = self._strip(attention)
        if isinstance(strip, str):
            return Skip(strip, at=attention)
        if strip.channels == attention.head_dim and strip.reduce == 1:
            return Skip("has nothing to reduce: no more channels, no fewer keys", at=attention)
        return strip

    def _strip(self, attention: Attention) -> Strip | str:
        """Lay the tokens of an attention out as a grid, or say why they are none."""
        queries, _ = counts(attention)
        assert attention.head_dim is not None
        channels = min(self.qk_channels, attention.head_dim)
        if self.grid is None:
            found = square(queries)
            if found is None:
                return f"has {queries} tokens, no square and none with one before it; give a grid"
            side, prefix = found
            strip = Strip(side, side, prefix, self.reduce, channels)
        else:
            rows, columns = self.grid
            strip = Strip(rows, columns, queries - rows * columns, self.reduce, channels)
        if strip.prefix < 0:
            return f"has {queries} tokens, fewer than a grid of {strip.height} x {strip.width}"
        return replace(strip, reduce=min(strip.reduce, max(strip.height, strip.width)))

    def replace(self, attention: Attention, strip: Strip) -> nn.Module:
        layers = attention.query, attention.key, attention.value, attention.output
        query, key, value, out = (affine(layer) for layer in layers if layer is not None)
        heads = attention.heads
        assert heads is not None
        assert attention.scale is not None
        if self.start == "random":
            q, k = drawn(query[0], heads, strip.channels, self.seed)
        else:
            q, k = thin(query, key, heads, strip.channels, attention.scale)
        weights = StripWeights(q, k, value, out)
        return Strips(weights, heads, strip, norm=self.kv_norm, local=self.local)

    def recovery(self, old: Program, new: Program, plan: Plan[Strip]) -> Sequence[Stage]:
        replaced = [a for a in self.regions(old) if a.label in plan.decisions]
        return trained_back(
            old, new, replaced, OWN, by=self.name, epochs=self.epochs, rate=self.rate
        )


def cannot_thin(attention: Attention) -> str | None:
    """Say why an attention's projections cannot be made anew, or None."""
    layers = [attention.query, attention.key, attention.value, attention.output]
    if any(layer is None or not layer.is_dense for layer in layers):
        return "has no four dense projections"
    if attention.heads is None or attention.heads != attention.kv_heads:
        return "shares keys among heads"
    if attention.qk_norm or attention.rotary.kind != "none" or attention.scale is None:
        return "normalises, rotates or scales queries and keys, which a low rank cannot"
    if len(attention.inputs) != 1 or len(attention.outputs) != 1:
        return "reads or computes something else as well"
    x, y = attention.inputs[0].meta["val"], attention.outputs[0].meta["val"]
    if attention.x_q is not attention.x_k or x.dim() != 3 or x.shape != y.shape:
        return "attends to something else than its own tokens"
    queries, keys = counts(attention)
    if queries != keys or not isinstance(x.shape[1], int):
        return "has fewer keys than queries already, or a number of tokens that may change"
    return None


def affine(layer: Layer) -> Affine:
    """Return weight and bias of a dense layer."""
    return layer.weight, layer.bias
