"""Compute a region only when something holds; a replacement that keeps what it replaces."""

from __future__ import annotations

from typing import Any

from torch import nn

from .regions import Region


class OnlyWhen(nn.Module):
    """The region where a condition holds, something else where it does not.

    When it is spliced in, the region's own nodes, its weights and the blocks it calls move into a
    branch as they are: nothing is traced again, and blocks stay instances of their class.

    Args:
        region: What is computed, or not.
        condition: Takes the region's inputs, returns one true or false.
        otherwise: Takes the region's inputs, returns its outputs.
    """

    def __init__(self, region: Region, condition: nn.Module, otherwise: nn.Module) -> None:
        super().__init__()
        self.region, self.condition, self.otherwise = region, condition, otherwise

    def forward(self, *inputs: Any) -> Any:
        if not bool(self.condition(*inputs)):
            return self.otherwise(*inputs)
        results = tuple(self.region.replay(inputs))
        return results if len(results) > 1 else results[0]
