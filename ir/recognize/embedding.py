"""Embeddings: tables, and all that makes a stream of an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, fx

from ..graphs import aten
from ..program import MAIN, Program
from ..regions import Region, find_once, local_path, unique_paths
from .calls import is_layer, joint_path
from .convolution import is_convolution, is_patchwise
from .flow import flow_of
from .surroundings import EMBEDDING, as_region, surroundings_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding(Region):
    """`y[i] = weight[ids[i]]`, with a weight that is a parameter.

    Attributes:
        weight_node: The `get_attr` node of the table, [vocab, dim].
    """

    weight_node: fx.Node
    kind: ClassVar[str] = "embedding"

    @property
    def weight(self) -> Tensor:
        """[vocab, dim]."""
        return self.tensor(self.weight_node)

    @property
    def weight_is_shared(self) -> bool:
        """Whether anything else of the model reads the same table."""
        return self.is_shared(self.weight_node)

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return every `embedding` whose table is a parameter."""
        nodes = [
            node
            for node in graph.nodes
            if node.target is aten.embedding.default and node.args[0].op == "get_attr"
        ]
        paths = unique_paths([local_path(node) for node in nodes])
        return [
            cls(
                path=path,
                nodes=(node,),
                inputs=(node.args[1],),
                outputs=(node,),
                weight_node=node.args[0],
            )
            for node, path in zip(nodes, paths, strict=True)
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Stem(Region):
    """How an input becomes a stream: tables, patches or layers, and positions added to them.

    Attributes:
        form: `patch` (a convolution whose stride is its kernel), `convolution`, `linear`, `table`,
            or `other`.
        tables: The tables that are looked up in it.
        layers: The linear layers and convolutions, as nodes.
        stored: The `get_attr` nodes that are added or joined as they are: positions, class tokens.
    """

    form: str
    tables: tuple[Embedding, ...]
    layers: tuple[fx.Node, ...]
    stored: tuple[fx.Node, ...]
    kind: ClassVar[str] = "embedding"

    def constants(self) -> dict[str, Any]:
        """Return the constants of the role as plain data."""
        counts = {"tables": self.tables, "layers": self.layers, "stored": self.stored}
        return {"form": self.form} | {name: len(found) for name, found in counts.items()}


def stems_of(program: Program) -> list[Stem]:
    """Return what makes the streams of a program, in order."""
    groups = surroundings_of(program).components(EMBEDDING)
    paths = unique_paths([joint_path(filter(_has_weights, nodes)) or "stem" for nodes in groups])
    tables = find_once(program.main, Embedding)
    return [_stem(program, nodes, path, tables) for nodes, path in zip(groups, paths, strict=True)]


def _stem(program: Program, nodes: list[fx.Node], path: str, tables: list[Embedding]) -> Stem:
    inside = set(nodes)
    layers = tuple(n for n in nodes if is_layer(n) or is_convolution(n))
    looked_up = tuple(t.bind(program, MAIN, None) for t in tables if t.nodes[0] in inside)
    norms = {n for norm in flow_of(program.main).norms for n in norm.nodes}
    others = [
        n for n in nodes if n not in (*layers, *(t.nodes[0] for t in looked_up)) and n not in norms
    ]
    stored = dict.fromkeys(s for n in others for s in n.all_input_nodes if s.op == "get_attr")
    return Stem(
        path=path,
        form=_form(layers, looked_up),
        tables=looked_up,
        layers=layers,
        stored=tuple(stored),
        program=program,
        **as_region(nodes),
    )


def _form(layers: tuple[fx.Node, ...], tables: tuple[Embedding, ...]) -> str:
    if any(is_patchwise(node) for node in layers):
        return "patch"
    if any(is_convolution(node) for node in layers):
        return "convolution"
    return "linear" if layers else "table" if tables else "other"


def _has_weights(node: fx.Node) -> bool:
    return any(source.op == "get_attr" for source in node.all_input_nodes)
