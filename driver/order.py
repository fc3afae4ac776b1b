"""Solve the order of passes from the facts they require, end and establish.

    a requires a fact that b ends          a before b
    a requires a fact that b establishes   b before a

Among the orders that satisfy all of these, the one nearest to the order given: whoever may go next
and stands first in it, goes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from ..ir.errors import OptionError
from ..passes.base import Pass
from .facts import check_recipe, clash

AnyPass = Pass[Any, Any]
Order = Literal["given", "auto"]


def ordered(passes: Sequence[AnyPass], order: str) -> list[AnyPass]:
    """Return passes in the order they are to run.

    Args:
        passes: Passes as given.
        order: `given` leaves them; `auto` solves an order, unless the given one works.

    Raises:
        OptionError: There is no such order of passes, or `order` is neither of the two.
    """
    if order not in get_args(Order):
        listed = " or ".join(get_args(Order))
        raise OptionError(f"order={order!r} is not supported.", remedy=f"use {listed}.")
    return solve(passes) if order == "auto" and not _works(passes) else list(passes)


def solve(passes: Sequence[AnyPass]) -> list[AnyPass]:
    """Return passes in an order that satisfies every fact.

    Raises:
        OptionError: Some of them need to go before each other; names them and the reasons.
    """
    import networkx as nx

    graph = _constraints(passes)
    try:
        places = list(nx.lexicographical_topological_sort(graph, key=int))
    except nx.NetworkXUnfeasible:
        cycle = nx.find_cycle(graph)
        names = dict.fromkeys(passes[before].name for before, _ in cycle)
        reasons = [graph.edges[edge]["reason"] for edge in cycle]
        raise OptionError(
            f"no order of {', '.join(names)} works: {'; '.join(dict.fromkeys(reasons))}.",
            remedy="leave one of them out, or limit it with include=... and exclude=....",
        ) from None
    return [passes[place] for place in places]


def _constraints(passes: Sequence[AnyPass]) -> Any:
    """Return the graph of what must go before what, an edge per reason."""
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for index, pass_ in enumerate(passes):
        for other, that in enumerate(passes):
            if other == index:
                continue
            for fact in sorted(pass_.requires & that.ends()):
                graph.add_edge(index, other, reason=clash(that, pass_, fact))
            for fact in sorted(pass_.requires & that.establishes()):
                reason = f"{pass_.name} needs that {fact}, which {that.name} brings about"
                graph.add_edge(other, index, reason=reason)
    return graph


def _works(passes: Sequence[AnyPass]) -> bool:
    """Whether no pass needs what an earlier one ends, or what only later ones bring about."""
    try:
        check_recipe(passes)
    except OptionError:
        return False
    for index, pass_ in enumerate(passes):
        later = {fact for other in passes[index + 1 :] for fact in other.establishes()}
        before = {fact for other in passes[:index] for fact in other.establishes()}
        if pass_.requires & (later - before):
            return False
    return True
