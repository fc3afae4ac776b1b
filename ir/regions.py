"""Regions: the parts of a model that passes ask for.

A region is found once per graph, so once per *class* of blocks, and then looked at through each
instance: `region.weight` is that instance's tensor. Finders work on dataflow alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, fx

from .graphs import block_calls, module_path, positions, remembered
from .program import MAIN, Program


@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """A set of nodes with a role.

    Attributes:
        path: Module path below the block (or the root), unique among the graph's regions.
        nodes: The nodes a replacement takes the place of, in graph order.
        inputs: Outside values the nodes read, weights not counted.
        outputs: Values that nodes outside may read.
        graph: Key of the graph in the program.
        instance: Block instance the region is looked at through; None in the main graph.
        program: Where it was found.
    """

    path: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    graph: str = MAIN
    instance: str | None = None
    program: Program = field(repr=False, default=None)  # type: ignore[assignment]

    kind: ClassVar[str] = "region"

    @property
    def label(self) -> str:
        """Name the region within the model, as in `encoder.layer.3.output.dense`."""
        return ".".join(part for part in (self.instance, self.path) if part)

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return all regions of this kind in a graph, in execution order."""
        raise NotImplementedError

    def tensor(self, node: fx.Node) -> Tensor:
        """Return the weight behind a `get_attr` node, as this instance has it."""
        return self.program.weight(str(node.target), self.instance)

    def is_shared(self, node: fx.Node) -> bool:
        """Whether anything else of the model reads the weight behind a `get_attr` node."""
        return len(node.users) > 1 or self.program.is_shared(str(node.target), self.instance)

    def replay(self, inputs: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
        """Run the region's nodes, as this instance has them, on the values of its inputs.

        Args:
            inputs: One value per entry of `inputs`.
            dtype: Compute floating-point values in this type; None keeps each as it is.
        """
        from .run import run_nodes

        known = dict(zip(self.inputs, inputs, strict=True))
        env = run_nodes(self.program, self.nodes, known, self.instance, dtype)
        return [env[node] for node in self.outputs]

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        """Return the same region looked at through an instance."""
        return changed(self, program=program, graph=graph, instance=instance)


R = TypeVar("R", bound=Region)
T = TypeVar("T")


def regions(program: Program, *kinds: type[R]) -> Iterator[R]:
    """Yield the regions of the given kinds in the whole program, in execution order."""
    per_class = {
        key: _distinct([region for kind in kinds for region in find_once(graph, kind)])
        for key, graph in program.graphs.items()
    }
    place, calls = positions(program.main), block_calls(program.main)
    found: list[tuple[int, str, str | None, list[R]]] = [
        (place[region.nodes[0]], MAIN, None, [region]) for region in per_class[MAIN]
    ]
    for name, node in calls.items():
        block = program.instances[name].block
        found.append((place[node], block, name, per_class[block]))
    for _, graph, instance, inside in sorted(found, key=lambda at: at[0]):
        for region in inside:
            yield region.bind(program, graph, instance)


def changed(part: T, **changes: object) -> T:
    """Return a copy of a frozen dataclass in which fields differ; a quick `dataclasses.replace`."""
    copy = object.__new__(type(part))
    copy.__dict__.update(part.__dict__, **changes)
    return copy


def local_path(node: fx.Node) -> str:
    """Return a node's module path below its block, or below the root in the main graph."""
    path = node.meta.get("local_path")
    return module_path(node) if path is None else str(path)


def unique_paths(paths: list[str]) -> list[str]:
    """Number repeated paths: `a`, `a#1`, ..."""
    seen: dict[str, int] = {}
    result: list[str] = []
    for path in paths:
        count = seen.get(path, 0)
        seen[path] = count + 1
        result.append(f"{path}#{count}" if count else path)
    return result


def _distinct(found: list[R]) -> list[R]:
    """Give regions of several kinds in one graph different paths; none is empty."""
    named = [r.kind.replace(" ", "_") + r.path if r.path[:1] in "#" else r.path for r in found]
    paths = unique_paths(named)
    for index, path in enumerate(paths):
        if path != found[index].path:
            found[index] = changed(found[index], path=path)
    return found


def find_once(graph: fx.Graph, kind: type[R]) -> list[R]:
    """Return the regions of a kind in a graph, found once per graph."""
    return list(remembered(graph, kind, kind.find))
