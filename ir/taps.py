"""Run a piece of a program: some of its values, from some others.

    module = tapped(program, fetches=[after], feeds=[before])      before -> blocks -> after
    (after_value,) = module(*inputs, before_value)

What is not needed for the values asked for is not computed, so this is how a method probes one
block, scores a stack without a block, or trains the weights between two cuts. A fed value is taken
as given: it may come from another program, and gradients end there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from .branches import is_cond
from .errors import OptionError
from .flatten import as_module, flat_graphs
from .graphs import block_calls, output_nodes, remove_dead
from .program import MAIN, Program
from .recognize.place import Place, made_at


def tapped(
    program: Program,
    fetches: Sequence[Place],
    feeds: Sequence[Place] = (),
    *,
    computed: bool = False,
) -> fx.GraphModule:
    """Return a flat module over shared weights that computes some values of a program.

    Args:
        program: Where the values are.
        fetches: What to return, in order; one of `feeds` is returned as it is given.
        feeds: Values that are given instead of computed.
        computed: Return a fetched value as the program computes it, though it is fed to what reads
            it: a student is compared at the value that the next one is given by the teacher.

    Returns:
        A module that takes the program's flat inputs, then the values of `feeds`, and returns a
        tuple. Its parameters keep their names and do not require gradients at first.

    Raises:
        OptionError: A place is not in the program.
    """
    graphs, at = flat_graphs(program)
    graph = graphs[MAIN]
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    found: dict[Place, fx.Node] = {}
    for number, place in enumerate(feeds):
        node = _node(program, at, place)
        with graph.inserting_after(last):
            last = graph.placeholder(f"feed_{number}")
        last.meta = {"val": node.meta.get("val")}
        node.replace_all_uses_with(last)
        if not computed:
            found[made_at(program, place)] = last
    results = [found.get(made_at(program, place)) or _node(program, at, place) for place in fetches]
    graph.output_node().args = (tuple(results),)
    remove_dead(graph)
    return _chooses_in_python(as_module(program, graphs))


def outputs_of(program: Program) -> tuple[Place, ...]:
    """Return what the program returns, state included, as places."""
    return tuple(made_at(program, Place(None, node)) for node in output_nodes(program.main))


def _chooses_in_python(module: fx.GraphModule) -> fx.GraphModule:
    """Let choices be plain `if`s: `cond` traces its branches anew on every call with gradients."""
    for part in module.modules():
        nodes = part.graph.nodes if isinstance(part, fx.GraphModule) else ()
        choices = [node for node in nodes if is_cond(node)]
        for node in choices:
            node.target = _chosen
        if choices:
            part.recompile()  # type: ignore[operator]
    return module


def _chosen(predicate: Tensor, yes: nn.Module, no: nn.Module, operands: Sequence[Any]) -> Any:
    return (yes if predicate else no)(*operands)


def _node(program: Program, at: dict[tuple[str | None, fx.Node], fx.Node], place: Place) -> fx.Node:
    found = made_at(program, place)
    node = at.get(found)
    if node is not None and not is_always_computed(program, found):
        raise OptionError(
            f"the value {place.node.name!r} is computed on some calls only.",
            where=place.instance or "a branch of the main graph",
            remedy="run the pass before the one that makes the model choose.",
        )
    if node is None:
        raise OptionError(
            f"the program has no value {place.node.name!r}.",
            where=place.instance or "the main graph",
            remedy="take places from the program itself, not from the one before a rewrite.",
        )
    return node


def is_always_computed(program: Program, place: Place) -> bool:
    """Whether a value lies in no branch."""
    if place.instance is None:
        return place.node.graph is program.main
    called = place.instance in block_calls(program.main)
    return called and place.node.graph is program.graphs[program.instances[place.instance].block]
