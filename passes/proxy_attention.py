"""See far through one proxy per window, and near within windows.

    x = x + gate * attention(modulate(norm(x)))         N * N pairs of tokens; instead:

    p = mean of each window, p = p + attention(norm(p))       N / w proxies see each other,
    x = x + out(cross_attention(norm(x), norm(p)))            tell all N tokens,
    x = x + gate * attention(modulate(norm(x)))               tokens see their window of w tokens,
    x = x + out(gate * attention(modulate(norm(x))))          and the one shifted by half of it

Attention within windows keeps the trained layers; the other two end in layers that are zero at
first, so that the surgery begins as windows and is trained from there.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize.added import AddedAttention
from ..ir.region_module import Call, RegionModule
from .base import Pass, Plan, Promise, Skip, require_choice, selected
from .shared.cores import sides
from .shared.losses import output_mse
from .shared.plain_core import heads_of, not_plain, options_of, tokens_of
from .shared.proxies import Far, Proxied, blank
from .shared.recovery import Stage
from .shared.windows import HeadGroup, WindowedAttention, WindowPlan, grid_of, tiling_of


@dataclass(frozen=True, kw_only=True)
class ProxyAttention(Pass[AddedAttention, WindowPlan]):
    """Replace attention among all tokens by proxies, windows and shifted windows.

    Attributes:
        window: Side of a window in tokens along each axis; one number for all. They fill the grid.
        grid: Tokens along each axis, the last one running fastest; by default a square.
        proxy: What stands for a window: its `mean` or its `first` token.
        shifted: Whether tokens also attend within windows shifted by half their side.
        prefix: Tokens in front of the grid, which see all tokens, and all tokens see them.
        suffix: Tokens behind the grid, likewise.
        only_cheaper: Leave attentions alone that would become dearer, as those of few tokens do.
        epochs: How often the calibration is seen when the new layers are trained.
        rate: Largest learning rate of that training.
        include: Glob patterns of attentions to replace.
        exclude: Glob patterns of attentions to leave alone.

    Raises:
        OptionError: An option is out of range.

    Source: Wang et al., Qihoo-T2X, 2024, arXiv:2409.04005, section 3 (PT-DiT).
    Differs: a surgery on a trained model, which the paper does not do: attention among proxies and
        within shifted windows begins with copies of the trained layers. Shifted windows have the
        shift, scale and gate of the others, without a table of their own. Proxies and windows have
        one size. There are no rotations among proxies.
    Exact when: a window holds the whole grid; such attentions are left as they are.
    """

    name: ClassVar[str] = "proxy-attention"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must copy"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"window": (1,), "only_cheaper": False},
    )  # fmt: skip
    window: tuple[int, ...] = (8,)
    grid: tuple[int, ...] = ()
    proxy: str = "mean"
    shifted: bool = True
    prefix: int = 0
    suffix: int = 0
    only_cheaper: bool = True
    epochs: int = 1
    rate: float = 1e-4
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "proxy", self.proxy, ("mean", "first"))
        sides = (*self.window, *self.grid)
        if not self.window or min(sides) < 1 or min(self.prefix, self.suffix) < 0:
            raise OptionError(
                f"{self.name}: window={list(self.window)}, grid={list(self.grid)},"
                f" prefix={self.prefix}, suffix={self.suffix}.",
                remedy="give sides of 1 or more, as in window=[4, 4], and other tokens from 0 on.",
            )
        if len(self.window) not in (1, len(self.grid) or 2):
            raise OptionError(
                f"{self.name}: window={list(self.window)} has other axes than the grid.",
                remedy="give one side for each axis, or one for all; a square has two axes.",
            )
        if self.epochs < 1 or self.rate <= 0:
            raise OptionError(
                f"{self.name}: epochs={self.epochs}, rate={self.rate}.",
                remedy="use one epoch or more, and a positive rate.",
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def decide(self, region: AddedAttention) -> WindowPlan | Skip:
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        reason = not_plain(region.attention) or _not_added(region)
        if reason:
            return Skip(reason, at=region)
        tokens = tokens_of(region.attention)
        grid = grid_of(tokens, self.grid, self.prefix, self.suffix)
        if isinstance(grid, str):
            return Skip(grid, at=region)
        window = list(self.window) * (len(grid) if len(self.window) == 1 else 1)
        if any(side % w for side, w in zip(grid, window, strict=True)):
            return Skip(f"has a grid of {grid}, which windows of {window} do not fill", at=region)
        if window == grid:
            return Skip("has one window for its whole grid", at=region)
        plan = WindowPlan(
            grid, [HeadGroup(heads_of(region.attention)[0], window, [0] * len(grid))],
            self.prefix, self.suffix,
        )  # fmt: skip
        before, after = costs(region, tokens, math.prod(window), self._shifts(window))
        if self.only_cheaper and after >= before:
            return Skip(f"would cost {after / before:.2f} times as much", at=region)
        return plan

    def replace(self, region: AddedAttention, decision: WindowPlan) -> nn.Module:
        attention, seed = region.attention, zlib.crc32(region.label.encode())
        tiling = tiling_of(decision, decision.groups[0])
        far = Far(attention, tiling, decision.prefix, decision.suffix, self.proxy, seed)
        near = within(region, decision, {})
        shifted = behind = None
        if self._shifts(tiling.window):
            own = {node: region.tensor(node).clone() for node in weights_of(region)}
            shifted = within(region, moved(decision), own)
            behind = blank(attention.layers[3])
        return Proxied(far, near, shifted, behind, region.inputs.index(region.stream))

    def recovery(self, old: Program, new: Program, plan: Plan[WindowPlan]) -> Sequence[Stage]:
        known = sorted(
            name
            for name in new.parameters
            if any(name.startswith(f"{label}.") for label in plan.decisions)
        )
        if not known:
            return []
        return [
            Stage(name="proxies", weights=dict.fromkeys(known), loss=output_mse(old, new),
                  epochs=self.epochs, rate=self.rate)
        ]  # fmt: skip

    def _shifts(self, window: Sequence[int]) -> bool:
        """Whether there are shifted windows: those of one token are where they were."""
        return self.shifted and max(window) > 1


def costs(region: AddedAttention, tokens: int, cells: int, shifted: bool) -> tuple[float, float]:
    """Return the multiply-adds of a sample before and after, those of layers included.

    Args:
        region: What is replaced.
        tokens: Tokens of the sequence.
        cells: Tokens of a window.
        shifted: Whether there are shifted windows as well.
    """
    query, key, value, out = (layer.weight.numel() for layer in region.attention.layers)
    layers, width = query + key + value + out, region.attention.layers[3].in_features
    proxies, times = tokens / cells, 1 + shifted
    far = layers * proxies + (query + out) * tokens + (key + value) * proxies
    pairs = proxies**2 + proxies * tokens + times * tokens * cells
    after = far + times * layers * tokens + shifted * out * tokens + 2 * width * pairs
    return layers * tokens + 2 * width * tokens**2, after


def within(
    region: AddedAttention, plan: WindowPlan, weights: Mapping[fx.Node, Any]
) -> RegionModule:
    """Return the sublayer with its attention within windows."""
    attention = region.attention
    core = WindowedAttention(plan, *heads_of(attention), options_of(attention))
    call = Call("windows", sides(attention))
    return RegionModule(region, weights, {attention.core: call}, {"windows": core})


def moved(plan: WindowPlan) -> WindowPlan:
    """Return a plan with windows shifted by half their side."""
    (group,) = plan.groups
    pairs = zip(group.window, plan.grid, strict=True)
    shift = [w // 2 if w < side else 0 for w, side in pairs]
    return WindowPlan(plan.grid, [HeadGroup(group.heads, group.window, shift)], plan.prefix,
                      plan.suffix)  # fmt: skip


def weights_of(region: AddedAttention) -> list[fx.Node]:
    """Return the stored values that a sublayer reads."""
    read = dict.fromkeys(n for node in region.nodes for n in node.all_input_nodes)
    return [node for node in read if node.op == "get_attr"]


def _not_added(region: AddedAttention) -> str | None:
    """Say why nothing can be added beside an attention."""
    attention, way = region.attention, region.sublayer.residual
    if attention.source != "self" or len(attention.streams) != 1:
        return "attends over several streams"
    if way.sign != 1 or region.stream not in region.inputs or len(region.outputs) != 1:
        return "is not simply added to its stream"
    dense = [layer for layer in attention.layers if layer.is_dense]
    if len(dense) < 4 or not attention.head_dim:
        return "has no dense layers for query, key, value and output"
    return None
