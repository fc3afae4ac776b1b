"""Hashing by signs, for those that make tables; what it is stands in `kernels/hashing.py`."""

from ...kernels.hashing import SCORES, chunks, hashed, rows_of

__all__ = ["SCORES", "chunks", "hashed", "rows_of"]
