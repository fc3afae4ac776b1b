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
        condition: Takes the region's inputs, returns one true or false; and behind it, in a tuple,
            values for the other modules, which take them behind the region's inputs.
        otherwise: Takes those, returns the region's outputs.
        afterwards: Where the region is computed, takes those and what the region gives, and returns
            the region's outputs; None leaves them as they are.
    """

    def __init__(
        self,
        region: Region,
        condition: nn.Module,
        otherwise: nn.Module,
        afterwards: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.region, self.condition, self.otherwise = region, condition, otherwise
        self.afterwards = afterwards

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The modules that are traced."""
        last = () if self.afterwards is None else (self.afterwards,)
        return self.condition, self.otherwise, *last

    def forward(self, *inputs: Any) -> Any:
        found = self.condition(*inputs)
        holds, *values = found if isinstance(found, tuple) else (found,)
        if not bool(holds):
            return self.otherwise(*inputs, *values)
        results = tuple(self.region.replay(inputs))
        if self.afterwards is not None:
            return self.afterwards(*inputs, *values, *results)
        return results if len(results) > 1 else results[0]
