"""Capture a deep model one block per kind, and stamp the rest.

`torch.export` takes milliseconds per node, so a thousand equal blocks take minutes. Here the first
block of each kind runs while exporting; in place of the others one opaque op is recorded, which
only knows the shapes that come out. Afterwards the first block's nodes become a class graph, and
each op a call of it with that block's own weights.

    kind: module types, code, every attribute, shapes and ties of weights, shapes of the inputs

An attribute that is neither plain data nor the very same object makes blocks different. Whatever
does not fit (control over the weights of others, written buffers, sizes as arguments) raises
`Unfit`, and the model is captured flat. One stamped block is exported on its own as a check.
"""

from __future__ import annotations

import contextlib
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .blueprint import blueprint, is_plain
from .fold import Occurrence, class_graph, outline
from .graphs import is_mutable
from .program import Program
from .shapes import describe

FEWEST = 12  # equal blocks in one list below which a model is captured flat


class Unfit(Exception):
    """The model cannot be captured block by block."""


@dataclass(frozen=True)
class _Layout:
    """Everything about a tensor but its values."""

    size: Any
    stride: Any
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor) -> Self:
        return cls(value.size(), value.stride(), value.dtype, value.device)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)

    def zeros(self) -> Tensor:
        """Return a real tensor of the example size."""
        size = [s.node.hint if isinstance(s, torch.SymInt) else s for s in self.size]
        return torch.zeros(size, dtype=self.dtype, device=self.device)


@dataclass
class Kind:
    """What equal blocks have in common.

    Attributes:
        block: The one that runs.
        path: Its module path.
        arguments: What it was called with, tensors by their layout.
        signature: Nesting of the arguments.
        outputs: Shape, strides, type and device of each tensor it returns.
        structure: Nesting of what it returns.
    """

    block: nn.Module
    path: str
    arguments: list[Any]
    signature: pytree.TreeSpec
    outputs: list[_Layout] = field(default_factory=list)
    structure: pytree.TreeSpec | None = None


@dataclass(frozen=True)
class Mark:
    """What one opaque op in the graph stands for.

    Attributes:
        kind: Which blocks this is about.
        role: `enter` and `leave` frame the block that runs; `stamp` stands for another one.
        path: Module path of the block.
        block: The block.
    """

    kind: Kind
    role: str
    path: str
    block: nn.Module


@torch.library.custom_op("blockwright::mark", mutates_args=())
def mark(values: list[Tensor], index: int) -> list[Tensor]:
    """Stand in the graph for entry `index` of the open press; never runs."""
    raise AssertionError("blockwright::mark only exists while a model is captured")


@mark.register_fake
def _(values: list[Tensor], index: int) -> list[Tensor]:
    found = Press.current.marks[index] if Press.current else None
    assert found is not None
    shapes = found.kind.outputs if found.role != "enter" else list(map(_Layout.of, values))
    return [layout.empty() for layout in shapes]


class Press:
    """Runs one block per kind while open, and remembers what it stamped."""

    current: Press | None = None

    def __init__(self, groups: Sequence[Sequence[tuple[str, nn.Module]]]) -> None:
        self.groups = groups
        self.marks: list[Mark] = []
        self._kinds: dict[tuple[int, object], Kind] = {}

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Divert the blocks' `forward`; hide the weights of those that will not run."""
        hidden: list[tuple[nn.Module, dict[str, Any]]] = []
        Press.current = self
        try:
            for number, group in enumerate(self.groups):
                for path, block in group:
                    block.forward = self._divert(number, path, block, block.forward)
                for _, block in group[1:]:
                    for child in block.modules():
                        kept = {k: child.__dict__[k] for k in ("_parameters", "_buffers")}
                        hidden.append((child, kept))
                        child.__dict__.update({k: _Hidden(held) for k, held in kept.items()})
            yield
        finally:
            Press.current = None
            for child, kept in reversed(hidden):
                child.__dict__.update(kept)
            for group in self.groups:
                for _, block in group:
                    block.__dict__.pop("forward", None)

    def _divert(
        self, number: int, path: str, block: nn.Module, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        first = block is self.groups[number][0][1]

        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            constants = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
            if any(isinstance(leaf, torch.SymInt) for leaf in constants):
                raise Unfit(f"{path} takes a size as argument")
            shapes = list(map(describe, tensors))
            key = (number, (repr(spec), repr(constants), repr(shapes)))
            kind = self._kinds.get(key)
            if kind is None and not first:
                raise Unfit(f"{path} is called with other arguments than the first of its kind")
            if kind is not None and first:
                raise Unfit(f"{path} is called twice")
            if kind is None:
                sketch = [_Layout.of(x) if isinstance(x, Tensor) else x for x in leaves]
                kind = self._kinds[key] = Kind(block, path, sketch, spec)
                inside = iter(self._mark(Mark(kind, "enter", path, block), tensors))
                given = [next(inside) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                args, kwargs = pytree.tree_unflatten(given, spec)
                before = blueprint(block)[1]
                results, kind.structure = pytree.tree_flatten(forward(*args, **kwargs))
                after = pytree.tree_leaves((args, kwargs))
                if len(after) != len(given) or any(a is not b for a, b in zip(after, given)):  # noqa: B905
                    raise Unfit(f"{path} changes its arguments")
                if blueprint(block)[1] != before:
                    raise Unfit(f"{path} changes its own attributes")
                if not all(isinstance(result, Tensor) for result in results):
                    raise Unfit(f"{path} returns something else than tensors")
                kind.outputs = list(map(_Layout.of, results))
                marked = self._mark(Mark(kind, "leave", path, block), results)
            else:
                marked = self._mark(Mark(kind, "stamp", path, block), tensors)
            assert kind.structure is not None
            return pytree.tree_unflatten(marked, kind.structure)

        return run

    def _mark(self, entry: Mark, values: Sequence[Tensor]) -> list[Tensor]:
        self.marks.append(entry)
        return list(torch.ops.blockwright.mark(list(values), len(self.marks) - 1))


class _Hidden(dict[str, Any]):
    """An empty table that remembers which names it hides, and tells whoever asks for one."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def __contains__(self, name: object) -> bool:
        if name in self.names:
            raise Unfit(f"something reads {name} of a block from outside")
        return False


def find_repeats(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """Return lists of equal blocks.

    They are siblings in one container, have no hooks, hold plain attributes only, and share no
    module with each other or the rest of the model.
    """
    groups: list[list[tuple[str, nn.Module]]] = []
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for path, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential) or len(container) < FEWEST:
            continue
        by_key: dict[object, list[tuple[str, nn.Module]]] = {}
        for name, block in container.named_children():
            hooked = any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())
            shared = any(places[id(m)] > 1 for m in block.modules())
            if not (hooked or shared or "forward" in vars(block)) and is_plain(block):
                _, key = blueprint(block)
                by_key.setdefault(key, []).append((f"{path}.{name}".strip("."), block))
        groups += [group for group in by_key.values() if len(group) >= FEWEST]
    nested = {id(m) for group in groups for _, b in group for m in b.modules() if m is not b}
    return [group for group in groups if id(group[0][1]) not in nested]


def stamp(program: Program, press: Press) -> Program:
    """Turn the marks in a flat program into classes and calls.

    Raises:
        Unfit: A block reads weights that are not its own, or writes into a tensor.
    """
    nodes = list(program.main.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    places: dict[int, list[_Place]] = {}
    for node in nodes:
        if node.target is _MARK:
            entry = press.marks[int(node.args[1])]
            places.setdefault(id(entry.kind), []).append(_Place(node, entry, _picked(node)))
    classes: list[tuple[fx.Graph, list[Occurrence]]] = []
    for found in places.values():
        enter, leave, *stamps = sorted(found, key=lambda place: _ROLES.index(place.entry.role))
        inner = nodes[position[enter.node] + 1 : position[leave.node]]
        graph, weights = _class_of(enter, leave, inner, program)
        read = sorted(enter.picked)  # an input the block ignores is not passed
        inside = {n for n in inner if n.op == "call_function"}
        owned = {enter.node, leave.node, *inside, *leave.picked.values()}
        occurrences = [
            _occurrence(program, enter, leave, owned, read, weights),
            *(
                _occurrence(program, s, s, {s.node, *s.picked.values()}, read, weights)
                for s in stamps
            ),
        ]
        classes.append((graph, occurrences))
    return outline(program, classes)


@dataclass(frozen=True)
class _Place:
    """A mark in the graph, and the nodes that pick its values by position."""

    node: fx.Node
    entry: Mark
    picked: Mapping[int, fx.Node]


def _class_of(
    enter: _Place, leave: _Place, inner: Sequence[fx.Node], program: Program
) -> tuple[fx.Graph, list[str]]:
    """Return the class graph, and the name below the block of the weight in each slot."""
    path = enter.entry.path
    inputs = [enter.picked[index] for index in sorted(enter.picked)]
    computed = [n for n in inner if n.op == "call_function" and n not in inputs]
    inside = {*inputs, *computed}
    own = {_canonical(program, f"{path}.{local}"): local for local in _locals(enter.entry.block)}
    weights: dict[fx.Node, str] = {}
    for node in computed:
        if is_mutable(node):
            raise Unfit(f"{path} writes into a tensor")
        if not inside.issuperset(set(node.users) - {leave.node}):
            raise Unfit(f"{node} of {path} is read from outside")
        for source in node.all_input_nodes:
            if source not in inside and source not in weights:
                if source.op != "get_attr" or str(source.target) not in own:
                    raise Unfit(f"{path} reads {source}, which is not its own")
                weights[source] = own[str(source.target)]
    returned: Any = leave.node.args[0]
    if not set(returned) <= set(computed):
        raise Unfit(f"{path} returns one of its inputs")
    return class_graph(computed, inputs, weights, returned, path), list(weights.values())


def _occurrence(
    program: Program,
    enter: _Place,
    leave: _Place,
    owned: set[fx.Node],
    read: Sequence[int],
    weights: Sequence[str],
) -> Occurrence:
    path, values = enter.entry.path, enter.node.args[0]
    assert isinstance(values, Sequence)
    count = len(enter.entry.kind.outputs)
    return Occurrence(
        path=path,
        anchor=enter.node,
        inputs=[values[index] for index in read],  # type: ignore[misc]
        results=[leave.picked.get(index) for index in range(count)],
        owned=owned,
        weights=[_canonical(program, f"{path}.{local}") for local in weights],
    )


def check_stamped(program: Program, press: Press, draw: random.Random) -> None:
    """Export one stamped block on its own and compare it with its class, op by op.

    Raises:
        Unfit: They differ.
    """
    from .exported import from_exported

    stamped = [entry for entry in press.marks if entry.role == "stamp"]
    if not stamped:
        return
    entry = draw.choice(stamped)
    given = [x.zeros() if isinstance(x, _Layout) else x for x in entry.kind.arguments]
    args, kwargs = pytree.tree_unflatten(given, entry.kind.signature)
    flat = from_exported(
        torch.export.export(entry.block, args, kwargs, strict=False), fold=False
    ).main
    ours = program.graphs[program.instances[entry.path].block]
    if _ops(flat) != _ops(ours):
        raise Unfit(f"{entry.path} computes something else than {entry.kind.path}")


def _ops(graph: fx.Graph) -> list[object]:
    """Return what a graph calls, with literals that cannot be sizes."""
    return [
        (str(n.target), [a for a in (*n.args, *n.kwargs.values()) if isinstance(a, float | str)])
        for n in graph.nodes
        if n.op == "call_function"
    ]


def _picked(node: fx.Node) -> dict[int, fx.Node]:
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}  # type: ignore[misc]


def _locals(block: nn.Module) -> list[str]:
    parameters = [name for name, _ in block.named_parameters(remove_duplicate=False)]
    return parameters + [name for name, _ in block.named_buffers(remove_duplicate=False)]


def _canonical(program: Program, name: str) -> str:
    return program.aliases.get(name, name)


_MARK = torch.ops.blockwright.mark.default
_ROLES = ("enter", "leave", "stamp")
