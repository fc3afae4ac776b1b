"""One position of an axis, picked by a stored index: `x[..., [-2], :]`, a slice that copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import fx

from ..regions import Region, local_path, unique_paths
from .calls import calls_to, op, shape

_COPIES = ("clone", "to", "_to_copy", "alias", "detach", "contiguous")


@dataclass(frozen=True, kw_only=True, eq=False)
class PickedPosition(Region):
    """`x[..., [i], ...]` with a stored i, the input being x.

    Attributes:
        axis: The axis.
        index_node: The `get_attr` node of the index, [1].
    """

    axis: int
    index_node: fx.Node
    kind: ClassVar[str] = "picked position"

    @property
    def position(self) -> int:
        """The index; a negative one counts from the end."""
        return int(self.tensor(self.index_node))

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return what one stored index picks along one axis."""
        found = [parts for node in calls_to(graph, ("index",)) if (parts := _parts(node))]
        paths = unique_paths([local_path(parts["outputs"][0]) for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]


def _parts(node: Any) -> dict[str, Any] | None:
    """Return the fields of a picked position; None for other indexing."""
    value, indices = node.args
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return None
    axis, index = given[0]
    nodes = [node]
    while op(index) in _COPIES and len(index.users) == 1:
        nodes.insert(0, index)
        index = index.args[0]
    if index.op != "get_attr" or shape(index) != (1,) or index.meta["val"].dtype != torch.int64:
        return None
    return {
        "nodes": tuple(nodes),
        "inputs": (value,),
        "outputs": (node,),
        "axis": axis,
        "index_node": index,
    }
