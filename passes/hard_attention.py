"""Let every query look at its K nearest keys alone.

    p = softmax(q @ k.T * scale + mask)         y = (p where it is among the K largest, else 0) @ v

Rows are not renormalised. Padding costs nothing of the K: masked keys have probability zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.recognize import Attention
from ..ir.region_module import RegionModule
from .base import Pass, Promise, Skip, selected
from .shared.hard import cannot_harden, hard_calls


@dataclass(frozen=True, kw_only=True)
class HardAttention(Pass[Attention, int]):
    """Replace soft attention by attention over the largest probabilities.

    Attributes:
        top_k: Keys that each query looks at, 1 or more.
        include: Glob patterns of attentions to replace.
        exclude: Glob patterns of attentions to leave alone.

    Raises:
        OptionError: `top_k` is below 1.

    Source: Nagarajan et al., AxFormer, 2020, arXiv:2010.03688 (selective hard attention, K = 30).
    Differs: all attentions that are included become hard; `prune-accuracy-driven` chooses those
        where the loss of a task falls.
    Exact when: `top_k` is at least the number of keys.
    """

    name: ClassVar[str] = "hard-attention"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"top_k": 2},)
    top_k: int = 30
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise OptionError(f"{self.name}: top_k={self.top_k} leaves no key; use 1 or more.")

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def decide(self, attention: Attention) -> int | Skip:
        if not selected(attention.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=attention)
        reason = cannot_harden(attention, self.top_k)
        return Skip(reason, at=attention) if reason else self.top_k

    def replace(self, attention: Attention, top_k: int) -> nn.Module:
        return RegionModule(attention, calls=hard_calls(attention, top_k))
