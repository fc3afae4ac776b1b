"""Attention in which every token sees every token: what can be given a structure of its own."""

from __future__ import annotations

from typing import Any

from ...ir.recognize import Attention
from ...ir.recognize.calls import arguments
from .cores import no_core, sides


def not_plain(attention: Attention) -> str | None:
    """Say why an attention is not one op in which all of a fixed number of tokens see each other.

    Returns:
        A reason that completes the sentence "the attention ...", or None.
    """
    if attention.source not in ("self", "joint"):
        return "attends to another sequence"
    reason = no_core(attention)
    if reason:
        return reason
    counts = [node.meta["val"].shape[2] for node in sides(attention)]
    if not all(isinstance(count, int) for count in counts):
        return "has no fixed number of tokens"
    return None if len(set(counts)) == 1 else "has fewer keys than queries"


def tokens_of(attention: Attention) -> int:
    """Return the number of tokens; ask `not_plain` first."""
    return int(sides(attention)[0].meta["val"].shape[2])


def heads_of(attention: Attention) -> tuple[int, int]:
    """Return the number of query heads and of key and value heads, as the op is given them."""
    query, key, _ = sides(attention)
    return int(query.meta["val"].shape[1]), int(key.meta["val"].shape[1])


def options_of(attention: Attention) -> dict[str, Any]:
    """Return what else `scaled_dot_product_attention` is called with: `scale`, `enable_gqa`."""
    given = arguments(attention.core)
    return {name: given[name] for name in ("scale", "enable_gqa") if given.get(name)}
