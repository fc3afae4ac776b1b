"""Regions: the parts of a model that passes ask for.

A region is found once per graph, so once per *class* of blocks, and then looked at through each
instance: `region.weight` is that instance's tensor. Finders work on dataflow alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, fx

from .branches import branches_of, choices, scope
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

    def tensor_name(self, node: fx.Node) -> str:
        """Return the name of the weight behind a `get_attr` node, as this instance has it."""
        slot = str(node.target)
        return self.program.instances[self.instance].weights[slot] if self.instance else slot

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
    return _within(program, MAIN, None, _found(program, kinds))


def _found(program: Program, kinds: Sequence[type[R]]) -> dict[str, list[R]]:
    """Return the regions of each graph, those of a block and its branches told apart by path."""
    found: dict[str, list[R]] = {}
    for root in {MAIN, *(instance.block for instance in program.instances.values())}:
        keys = scope(program.graphs, root)
        each = [[r for k in kinds for r in find_once(program.graphs[key], k)] for key in keys]
        named = iter(_distinct([region for regions in each for region in regions]))
        found |= {
            key: [next(named) for _ in regions] for key, regions in zip(keys, each, strict=True)
        }
    return found


def _within(
    program: Program, key: str, instance: str | None, found: Mapping[str, list[R]]
) -> Iterator[R]:
    """Yield the regions of a graph and of what it calls, in execution order."""
    graph = program.graphs[key]
    place = positions(graph)
    calls = [*block_calls(graph).values(), *choices(graph)]
    if not calls:
        yield from (region.bind(program, key, instance) for region in found[key])
        return
    steps: list[tuple[int, Any]] = [(place[region.nodes[0]], region) for region in found[key]]
    steps += [(place[node], node) for node in calls]
    for _, step in sorted(steps, key=lambda at: at[0]):
        if isinstance(step, Region):
            yield step.bind(program, key, instance)  # type: ignore[misc]
        elif step.op == "call_module":
            name = str(step.target)
            yield from _within(program, program.instances[name].block, name, found)
        else:
            for branch in branches_of(step):
                yield from _within(program, branch, instance, found)


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
