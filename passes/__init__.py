"""The register: one published method per file, in alphabetical order."""

from .base import Pass, Plan, Promise, Skip
from .canonicalize import Canonicalize
from .fold_constants import FoldConstants
from .fuse_projections import FuseProjections
from .quantize_weights import QuantizeWeights

PASSES: tuple[type[Pass], ...] = (Canonicalize, FoldConstants, FuseProjections, QuantizeWeights)  # type: ignore[type-arg]

__all__ = [
    "PASSES",
    "Canonicalize",
    "FoldConstants",
    "FuseProjections",
    "Pass",
    "Plan",
    "Promise",
    "QuantizeWeights",
    "Skip",
]
