"""The two products of an attention as one: which axes are queries, keys, heads and features."""

from __future__ import annotations

from typing import Any

from torch import fx

from .calls import arguments, op, shape

Order = tuple[int, ...]
Axes = tuple[str, ...]
Sides = tuple[tuple[fx.Node, fx.Node, fx.Node], tuple[Order, Order, Order, Order] | None]


def sides_between(first: fx.Node, last: fx.Node, probabilities: fx.Node) -> Sides | None:
    """Return query, key and value, and how their axes are ordered."""
    scored, attended = _letters(first), _letters(last)
    if scored is None or attended is None:
        return None
    (q, k, s), (p, v, y) = scored, attended
    (query, key), (weights, value) = _factors(first), _factors(last)
    if weights is not probabilities:
        weights, value, p, v = value, weights, v, p
    if weights is not probabilities or len(p) != len(s) or len(set(p)) != len(p):
        return None
    names = dict(zip(p, s, strict=True))
    v, y = (tuple(names.get(c, f"{c}*") for c in letters) for letters in (v, y))
    *batch, i, j = s
    if i not in q:
        query, key, q, k = key, query, k, q
    d, e = set(q) - {*batch, i}, set(v) - {*batch, j}
    wanted = ((*batch, i, *d), (*batch, j, *d), (*batch, j, *e), (*batch, i, *e))
    pairs = list(zip(wanted, (q, k, v, y), strict=True))
    if len(d) != 1 or len(e) != 1 or any(sorted(w) != sorted(have) for w, have in pairs):
        return None
    ways = [tuple(have.index(c) for c in w) for w, have in pairs]
    key, ways[1] = _upright(key, ways[1])
    plain = all(order == tuple(range(len(order))) for order in ways)
    return (query, key, value), None if plain else (ways[0], ways[1], ways[2], ways[3])


def _upright(key: fx.Node, order: Order) -> tuple[fx.Node, Order]:
    """Return the keys before their last two axes were swapped for the product."""
    rank = len(order)
    turns = op(key) in ("transpose", "mT", "permute", "swapaxes")
    if turns and order[-2:] == (rank - 1, rank - 2):
        source: Any = key.args[0]
        swaps = list(range(rank))
        if op(key) == "permute":
            places: Any = key.args[1]
            swaps = [axis % rank for axis in places]
        else:
            given: Any = key.args[1:] or (-2, -1)  # `mT` names no axes
            one, two = (axis % rank for axis in given)
            swaps[one], swaps[two] = two, one
        return source, tuple(swaps[axis] for axis in order)
    return key, order


def _factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the two tensors that are multiplied."""
    given = arguments(product)
    if op(product) == "einsum":
        one, two = given["tensors"]
        return one, two
    if op(product) == "baddbmm":
        return given["batch1"], given["batch2"]
    return product.args[0], product.args[1]  # type: ignore[return-value]


def _letters(product: fx.Node) -> tuple[Axes, Axes, Axes] | None:
    """Return the axes of both factors and the result as letters, as in an einsum."""
    if op(product) != "einsum":
        ranks = {len(shape(n)) for n in (*_factors(product), product)}
        if len(ranks) != 1:
            return None
        batch = tuple("abcdefgh"[: ranks.pop() - 2])
        return (*batch, "i", "k"), (*batch, "k", "j"), (*batch, "i", "j")
    given = arguments(product)
    left, arrow, right = given["equation"].replace(" ", "").partition("->")
    sources = left.split(",")
    if not arrow or len(sources) != 2 or "." in left or len(given["tensors"]) != 2:
        return None
    if any(len(set(letters)) != len(letters) for letters in (*sources, right)):
        return None
    return tuple(sources[0]), tuple(sources[1]), tuple(right)
