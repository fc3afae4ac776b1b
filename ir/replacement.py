"""A region and what stands in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from .blueprint import blueprint
from .only_when import OnlyWhen
from .region_module import RegionModule
from .regions import Region


@dataclass(frozen=True)
class Replacement:
    """A region and what stands in its place.

    Attributes:
        region: What is replaced.
        parts: The modules that are traced: the one that replaces it, or those of an `OnlyWhen`.
        weights: Their parameters and buffers by name, part by part.
        key: How they are built, weight values left out; equal keys trace equally.
    """

    region: Region
    parts: tuple[nn.Module, ...]
    weights: tuple[Mapping[str, Tensor], ...]
    key: object

    @classmethod
    def of(cls, region: Region, module: nn.Module) -> Self:
        """Look a module over, once."""
        choosing = isinstance(module, OnlyWhen)
        parts = module.parts if isinstance(module, OnlyWhen) else (module,)
        found = [blueprint(part) for part in parts]
        return cls(region, parts, tuple(w for w, _ in found), (choosing, *(k for _, k in found)))

    @property
    def tensors(self) -> list[Tensor]:
        """All weights, in order."""
        return [tensor for weights in self.weights for tensor in weights.values()]

    def slot(self, name: str) -> str:
        """Return the slot of a weight; what keeps the old computation keeps its names."""
        known = all(isinstance(part, RegionModule) for part in self.parts)
        return name if known or not self.region.path else f"{self.region.path}.{name}"
