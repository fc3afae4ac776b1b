"""What goes of a sublayer: some of its units, keys that are far, or all of it."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.recognize import Attention, Coupled, FeedForward, coupled_heads, coupled_neurons
from ...ir.region_module import RegionModule
from .hard import hard_calls


@dataclass(frozen=True)
class Cut:
    """What goes of a sublayer.

    Attributes:
        drop: Everything.
        keep: Heads (groups of them, where they share keys and values) or neurons that stay; None
            for all of them.
        top_k: Keys that a query looks at; None for all of them.
        removed: Units that do not stay.
    """

    drop: bool = False
    keep: tuple[int, ...] | None = None
    top_k: int | None = None
    removed: int = 0


def coupled_of(region: Attention | FeedForward) -> Coupled:
    """Return the heads or the neurons of a sublayer."""
    return coupled_heads(region) if isinstance(region, Attention) else coupled_neurons(region)


def cut(region: Attention | FeedForward, decision: Cut) -> RegionModule:
    """Return a sublayer that is really smaller."""
    weights, calls = ({}, {}) if decision.keep is None else coupled_of(region).kept(decision.keep)
    if decision.top_k is not None and isinstance(region, Attention):
        calls |= hard_calls(region, decision.top_k)
    return RegionModule(region, weights, calls)


def masked(region: Attention | FeedForward, decision: Cut) -> RegionModule:
    """Return a sublayer of the old size that computes the same as the smaller one."""
    weights = {} if decision.keep is None else coupled_of(region).masked(decision.keep)
    hard = decision.top_k is not None and isinstance(region, Attention)
    calls = hard_calls(region, decision.top_k) if hard else {}  # type: ignore[arg-type]
    return RegionModule(region, weights, calls)
