"""A region as a module: what a pass starts from when it keeps the old computation.

    y = RegionModule(region)(*inputs)

To wrap it (a gate, an adapter, a scale), to compute it over other weights or with some of its calls
replaced, to train it again, and as the first version of a pass whose own module is still to be
written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from .graphs import is_mutable
from .regions import Region

_NONE: Mapping[Any, Any] = MappingProxyType({})


class Call(NamedTuple):
    """What is called in the place of a node.

    Attributes:
        target: The function, or the name of one of the module's parts.
        args: Its arguments, nodes of the region among them.
        kwargs: Its arguments by name.
    """

    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = _NONE


class RegionModule(nn.Module):
    """The nodes of a region with its weights as parameters and buffers, under their own names.

    Instances of one block class share the nodes and so are traced once; see `ir.rewrite`.

    Args:
        region: What to compute, as its instance has it.
        weights: Other tensors for some of the `get_attr` nodes that the region reads.
        calls: What is called instead of some of its nodes; what nobody reads then is not computed.
        parts: Modules that calls name as their target, by the name their weights get. Instances
            with equal parts stay one class, which they do not when a call holds its module.
    """

    def __init__(
        self,
        region: Region,
        weights: Mapping[fx.Node, Tensor] = _NONE,
        calls: Mapping[fx.Node, Call] = _NONE,
        parts: Mapping[str, nn.Module] = _NONE,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = region.inputs, region.outputs
        steps = {
            node: calls.get(node) or Call(node.target, node.args, node.kwargs)
            for node in region.nodes
        }
        self.steps = _needed(steps, region.outputs)
        known = {*region.inputs, *region.nodes}
        read = (source for _, step in self.steps for source in _sources(step))
        self.slots = tuple(dict.fromkeys(source for source in read if source not in known))
        self.names = tuple(
            self._hold(str(slot.target), weights.get(slot, region.tensor(slot)))
            for slot in self.slots
        )
        self.parts = {name: self._graft(name, part) for name, part in parts.items()}

    def forward(self, *inputs: Any) -> Tensor | tuple[Tensor, ...]:
        env: dict[fx.Node, Any] = dict(zip(self.inputs, inputs, strict=True))
        env |= {
            slot: attrgetter(name)(self) for slot, name in zip(self.slots, self.names, strict=True)
        }
        for node, step in self.steps:
            args, kwargs = fx.node.map_arg((step.args, dict(step.kwargs)), env.__getitem__)
            target = step.target
            called = self.get_submodule(self.parts[target]) if isinstance(target, str) else target
            env[node] = called(*args, **kwargs)
        results = tuple(env[node] for node in self.outputs)
        return results if len(results) > 1 else results[0]

    def _hold(self, name: str, tensor: Tensor) -> str:
        """Keep a weight under its name, or one like it where modules have that name already."""
        name, owner, leaf = self._place(name)
        if tensor.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(leaf, tensor)
        return name

    def _graft(self, name: str, part: nn.Module) -> str:
        """Keep a module under its name, or one like it."""
        name, owner, leaf = self._place(name)
        owner.add_module(leaf, part)
        return name

    def _place(self, name: str) -> tuple[str, nn.Module, str]:
        """Return a free name like the one asked for, the module it is in, and its last part."""
        owner: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
            if not isinstance(owner, nn.Module):
                return self._place(name.replace(".", "_") + "_")
        return self._place(f"{name}_") if hasattr(owner, leaf) else (name, owner, leaf)


def _needed(
    steps: Mapping[fx.Node, Call], outputs: tuple[fx.Node, ...]
) -> tuple[tuple[fx.Node, Call], ...]:
    """Return the steps that results are made of, in order."""
    needed = set(outputs)
    found: list[tuple[fx.Node, Call]] = []
    for node, step in reversed(list(steps.items())):
        if node in needed or is_mutable(node):
            needed.update(_sources(step))
            found.append((node, step))
    return tuple(found[::-1])


def _sources(step: Call) -> list[fx.Node]:
    """Return the nodes that a step reads."""
    found: list[fx.Node] = []
    fx.node.map_arg((step.args, dict(step.kwargs)), found.append)
    return found
