"""Let the tokens of a grid attend within windows.

    y = softmax(scale * q @ k.T) @ v        token by token:  keys in the window of the query alone

Windows cut a grid of tokens into boxes of one size; shifted ones begin half a window later, so that
tokens on both sides of a border meet. Heads may differ: with `double`, some attend in straight
windows and the others in shifted ones, and one block sees across every border.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Attention
from .base import Evidence, Pass, Plan, Promise, Skip, require_choice, selected
from .shared.cores import with_core
from .shared.plain_core import heads_of, not_plain, options_of, tokens_of
from .shared.windows import HeadGroup, WindowedAttention, WindowPlan, fits_heads, grid_of


@dataclass(frozen=True, kw_only=True)
class WindowAttention(Pass[Attention, WindowPlan]):
    """Replace attention among all tokens of a grid by attention within windows.

    Attributes:
        window: Side of a window in tokens along each axis of the grid; one number for all axes.
        grid: Tokens along each axis, the last one running fastest; by default a square.
        shift: Which windows are shifted by half their side: `none`; `all`; those of every other
            attention that is replaced (`alternate`); or those of some heads of each (`double`).
        shifted_ratio: Fraction of the heads whose windows are shifted, the last ones, for `double`.
        prefix: Tokens in front of the grid, such as a class token or text. They see all tokens, and
            all tokens see them.
        suffix: Tokens behind the grid, likewise.
        every: Replace each attention of so many, counted from the first.
        include: Glob patterns of attentions to replace.
        exclude: Glob patterns of attentions to leave alone.

    Raises:
        OptionError: An option is out of range.

    Source: Zhang et al., StyleSwin, 2022, arXiv:2112.10762, section 3.2 (double attention); Mo et
        al., DiT-3D, 2023, arXiv:2307.01831, section 3.3 (3-D windows); Liu et al., Swin, 2021,
        arXiv:2103.14030 (shifted windows).
    Differs: windows stand in the place of a trained attention among all tokens, without a bias of
        relative positions; regions are kept apart entirely, not by -100. The released code of
        DiT-3D attends among all tokens where the paper has windows; this follows the paper.
    Exact when: a window holds the whole grid; such attentions are left as they are.
    """

    name: ClassVar[str] = "window-attention"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"window": (1,)},)
    window: tuple[int, ...] = (8,)
    grid: tuple[int, ...] = ()
    shift: str = "none"
    shifted_ratio: float = 0.5
    prefix: int = 0
    suffix: int = 0
    every: int = 1
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "shift", self.shift, ("none", "all", "alternate", "double"))
        sides = (*self.window, *self.grid)
        if not self.window or min(sides) < 1 or min(self.prefix, self.suffix) < 0 or self.every < 1:
            raise OptionError(
                f"{self.name}: window={list(self.window)}, grid={list(self.grid)},"
                f" prefix={self.prefix}, suffix={self.suffix}, every={self.every}.",
                remedy="give sides of 1 or more, as in window=[4, 4], and other tokens from 0 on.",
            )
        if len(self.window) not in (1, len(self.grid) or 2):
            raise OptionError(
                f"{self.name}: window={list(self.window)} has other axes than the grid.",
                remedy="give one side for each axis, or one for all; a square has two axes.",
            )
        if not 0 < self.shifted_ratio < 1:
            raise OptionError(
                f"{self.name}: shifted_ratio={self.shifted_ratio} is no fraction of the heads.",
                remedy='use a number between 0 and 1, or shift="none" or "all".',
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def decide(self, attention: Attention) -> WindowPlan | Skip:
        if not selected(attention.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=attention)
        reason = not_plain(attention)
        if reason:
            return Skip(reason, at=attention)
        grid = grid_of(tokens_of(attention), self.grid, self.prefix, self.suffix)
        if isinstance(grid, str):
            return Skip(grid, at=attention)
        window = [min(pair) for pair in zip(self._sides(grid), grid, strict=True)]
        if window == grid:
            return Skip("has one window for its whole grid", at=attention)
        heads, kv_heads = heads_of(attention)
        groups = self._groups(heads, window, grid)
        if not fits_heads([group.heads for group in groups], heads, kv_heads):
            return Skip(
                f"has {kv_heads} heads of keys, which {groups[0].heads} of {heads} query heads"
                " do not share among themselves",
                at=attention,
            )
        return WindowPlan(grid, groups, self.prefix, self.suffix)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[WindowPlan]:
        able = super().plan(program)
        chosen = list(able.decisions.items())[:: self.every]
        stay = dict.fromkeys(able.decisions, f"is not one of every {self.every} to be replaced")
        if self.shift == "alternate":
            chosen[::2] = [(label, straight(decision)) for label, decision in chosen[::2]]
        decisions = dict(chosen)
        stay = {label: why for label, why in stay.items() if label not in decisions}
        return Plan(decisions, {**able.skips, **stay})

    def replace(self, attention: Attention, decision: WindowPlan) -> nn.Module:
        core = WindowedAttention(decision, *heads_of(attention), options_of(attention))
        return with_core(attention, "windows", core)

    def statistics(self, plan: Plan[WindowPlan]) -> Mapping[str, int]:
        shifted = [any(any(g.shift) for g in d.groups) for d in plan.decisions.values()]
        return {"with shifted windows": sum(shifted)}

    def _sides(self, grid: list[int]) -> list[int]:
        return list(self.window) * (len(grid) if len(self.window) == 1 else 1)

    def _groups(self, heads: int, window: list[int], grid: list[int]) -> list[HeadGroup]:
        """Return which heads have which windows; none is shifted along an axis it covers."""
        still = [0] * len(grid)
        moved = [w // 2 if w < side else 0 for w, side in zip(window, grid, strict=True)]
        shifted = {"none": 0, "double": round(self.shifted_ratio * heads)}.get(self.shift, heads)
        groups = HeadGroup(heads - shifted, window, still), HeadGroup(shifted, window, moved)
        return [group for group in groups if group.heads]


def straight(plan: WindowPlan) -> WindowPlan:
    """Return a plan without shifts."""
    return replace(plan, groups=[replace(g, shift=[0] * len(g.shift)) for g in plan.groups])
