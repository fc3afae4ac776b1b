"""Something else in the place of softmax(q @ k.T) @ v, between projections that stay.

A method says what stands there, as a module of queries, keys and values; here it is said where it
can, how it is fitted to the values it will see, and how the attention is trained back around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx, nn

from ...ir.program import MAIN, Program
from ...ir.recognize import Attention
from ...ir.recognize.calls import arguments, op
from ...ir.recognize.place import Place
from ...ir.region_module import Call, RegionModule
from ...ir.regions import Region, local_path
from ...ir.run import run, run_nodes
from ...ir.shapes import concrete
from .losses import balanced_features, output_mse
from .recovery import Stage

Fitter = Callable[[Attention, Tensor, Tensor, Tensor], nn.Module]
_NONE: Mapping[Any, Any] = MappingProxyType({})


def sides(attention: Attention) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Return query, key and value of a core that `no_core` has nothing against."""
    given = arguments(attention.core)
    return given["query"], given["key"], given["value"]


def no_core(attention: Attention, masks: Sequence[str] = ("none",)) -> str | None:
    """Say why nothing else can stand in the place of an attention's core, or None.

    Args:
        attention: The attention.
        masks: Masks that what is to stand there knows, as `Attention.mask` names them.
    """
    if op(attention.core) != "scaled_dot_product_attention":
        return "is spelled out in a way that canonicalize leaves alone, or before it has run"
    query, key, _ = sides(attention)
    rank = {node.meta["val"].dim() for node in (query, key)}
    if rank != {4} or not all(isinstance(n.meta["val"].shape[1], int) for n in (query, key)):
        return "has no axis of heads"
    if attention.mask not in masks:
        return f"is masked ({attention.mask})"
    return None


def counts(attention: Attention) -> tuple[int, int]:
    """Return the number of queries and of keys, dynamic ones as in the example."""
    size = concrete(attention.program, None)
    query, key, _ = sides(attention)
    return size(query.meta["val"].shape[2]), size(key.meta["val"].shape[2])


def with_core(
    attention: Attention,
    name: str,
    core: nn.Module,
    values: Sequence[fx.Node] | None = None,
    weights: Mapping[fx.Node, Tensor] = _NONE,
) -> RegionModule:
    """Return an attention with another core.

    Args:
        attention: As it is.
        name: Stands before the names of the core's weights.
        core: Called with query, key and value, [batch, heads, seq, head_dim] each.
        values: What it is called with instead.
        weights: Other tensors for some of the attention's weights.
    """
    path = own_name(attention.path, name)
    call = Call(path, tuple(values or sides(attention)))
    return RegionModule(attention, weights, {attention.core: call}, {path: core})


def own_name(path: str, name: str) -> str:
    """Return the name of a part of a region."""
    return ".".join(filter(None, (path, name)))


def fit_in_order(
    program: Program, attentions: Sequence[Attention], inputs: Sequence[Tensor], fit: Fitter
) -> None:
    """Fit the cores of some attentions on one set of inputs, each behind those fitted before.

    Args:
        program: Where the attentions are.
        attentions: Which `no_core` has nothing against.
        inputs: Flat inputs of the program.
        fit: Given an attention, its query, key and value; returns what computes in its place.
    """

    def call(attention: Attention, *values: Any) -> Any:
        before = list(takewhile(lambda node: node is not attention.core, attention.nodes))
        known = dict(zip(attention.inputs, values, strict=True))
        env = run_nodes(program, before, known, attention.instance)
        return fit(attention, *(env[node] for node in sides(attention)))(*values)

    run(program, inputs, instead=[(a, partial(call, a)) for a in attentions])


def heads_of(query: Tensor, x: Tensor) -> Tensor:
    """Return keys or values with a head for each head of the queries."""
    copies = query.shape[1] // x.shape[1]
    return x if copies == 1 else x.repeat_interleave(copies, dim=1)


def trained_back(
    old: Program,
    new: Program,
    attentions: Sequence[Attention],
    own: Sequence[str] = (),
    *,
    by: str,
    epochs: int,
    rate: float,
) -> list[Stage]:
    """Return the training of attentions that compute something else now.

    The outputs of the program and what each attention adds to its stream are to be those of the
    teacher, see `balanced_features`.

    Args:
        old: The teacher, with the attentions.
        new: The student.
        attentions: Those that were replaced.
        own: Names of new weights below the path of each.
        by: Name of the pass.
        epochs: How often the calibration is seen.
        rate: Largest learning rate.
    """
    known = {name for a in attentions for name in _weights(a, own)} & set(new.tensors)
    if not known:
        return []
    found = [(a, places) for a in attentions if len(places := _results(new, a, by)) == 1]
    ours = [place for _, (place,) in found]
    theirs = [Place(a.instance, a.outputs[0]) for a, _ in found]
    loss = balanced_features(output_mse(old, new), ours, theirs)
    weights = dict.fromkeys(sorted(known))
    return [Stage(name="attention", weights=weights, loss=loss, epochs=epochs, rate=rate)]


def _results(new: Program, region: Region, by: str) -> list[Place]:
    """Return what the rest of a graph reads of that which a pass has put in a region's place."""
    graph = new.graphs[new.instances[region.instance].block if region.instance else MAIN]
    made = {node for node in graph.nodes if _made_by(node, by) and local_path(node) == region.path}
    return [Place(region.instance, node) for node in graph.nodes
            if node in made and not made.issuperset(node.users)]  # fmt: skip


def _made_by(node: fx.Node, by: str) -> bool:
    sources = node.meta.get("from_node") or [None]
    return getattr(sources[-1], "pass_name", None) == by


def _weights(attention: Attention, own: Sequence[str]) -> Iterator[str]:
    """Yield the names of an attention's weights in the new program, old ones and new ones."""
    for layer in attention.layers:
        for slot in (layer.weight_node, layer.bias_node):
            if slot is not None:
                yield attention.tensor_name(slot)
    yield from (own_name(attention.label, name) for name in own)
