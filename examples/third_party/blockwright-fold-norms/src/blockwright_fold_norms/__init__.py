"""The pass `fold-norms` for blockwright."""

from .fold_norms import FoldNorms

__all__ = ["FoldNorms"]
