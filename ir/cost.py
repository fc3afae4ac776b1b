"""What a program costs: parameters, FLOPs and bytes, counted from shapes alone.

One multiply-add is two FLOPs. Attention counts both matrix products over all keys, masked or not.
Everything else that computes counts one FLOP per element of its result; views count nothing.
Works on meta tensors, and does the work once per block class.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from .branches import branches_of, choices
from .graphs import aten, block_calls
from .ops import OPS
from .program import MAIN, Program
from .regions import local_path
from .shapes import Size, concrete

Shape = tuple[int, ...]

_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)


@dataclass(frozen=True)
class Cost:
    """What one call costs.

    Attributes:
        parameters: Weights, tied ones once, quantized ones as the weights they stand for.
        activated_parameters: Weights one token is multiplied with, embeddings included.
        weight_bytes: Bytes of all stored tensors, scales and buffers included.
        state_bytes: Bytes a session keeps from call to call; twice as much while a call runs.
        flops: Floating-point (or integer) operations; one multiply-add is two. Of two branches
            the dearer one counts, here, in `bytes_moved` and in `by_kind`.
        bytes_moved: Bytes every op reads and writes when nothing is fused.
        by_kind: FLOPs by kind: linear, attention, convolution, elementwise.
        expected_flops: FLOPs of a call on average over the steps of a schedule, see `share_of`;
            where it is not known how often a branch is computed, the dearer one counts.
    """

    parameters: int
    activated_parameters: int
    weight_bytes: int
    flops: int
    bytes_moved: int
    by_kind: Mapping[str, int] = field(default_factory=dict)
    expected_flops: int = 0
    state_bytes: int = 0
    _places: Sequence[tuple[str, _Tally]] = field(default=(), repr=False)
    _stored: Sequence[tuple[str, _Tally]] = field(default=(), repr=False)

    @property
    def by_path(self) -> dict[str, int]:
        """FLOPs by module path."""
        return _at_paths((place, tally.flops) for place, tally in self._places)

    @property
    def coded_by_path(self) -> dict[str, int]:
        """Weights stored as codes, which are no parameters of the program, by module path."""
        return _at_paths((place, tally.coded) for place, tally in self._stored)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without the table of paths."""
        return {
            "parameters": self.parameters,
            "activated_parameters": self.activated_parameters,
            "weight_bytes": self.weight_bytes,
            "flops": self.flops,
            **({"expected_flops": self.expected_flops} if self.expected_flops < self.flops else {}),
            "bytes_moved": self.bytes_moved,
            **({"state_bytes": self.state_bytes} if self.state_bytes else {}),
            "by_kind": dict(self.by_kind),
        }


@dataclass
class _Tally:
    """Cost of one graph, calls not entered."""

    kinds: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    coded: Counter[str] = field(default_factory=Counter)
    # By the first weight a call reads, which others may share:
    codes: dict[str, int] = field(default_factory=dict)
    idle: dict[str, int] = field(default_factory=dict)
    bytes_moved: int = 0


def program_cost(program: Program, sizes: Mapping[str, int] | None = None) -> Cost:
    """Count what one call of a program costs.

    Args:
        program: What to count; its tensors may be on the meta device.
        sizes: Size of dynamic dimensions by name; those left out are as in the example inputs.
    """
    size = concrete(program, sizes)
    tallies = {key: _tally(graph, size) for key, graph in program.graphs.items()}
    stored = [
        (name, tallies[key]) for name in (None, *program.instances) for key in program.scope(name)
    ]
    path = _Path(program, tallies, dearest=True)
    path.walk(MAIN, None, 1.0)
    kinds: Counter[str] = Counter()
    for _, tally in path.places:
        kinds.update(tally.kinds)
    average = _Path(program, tallies, dearest=False)
    average.walk(MAIN, None, 1.0)
    parameters = sum(program.tensors[name].numel() for name in program.parameters)
    codes, idle = dict[str, int](), dict[str, int]()
    for place, tally in stored:
        codes |= _by_name(program, place, tally.codes)
        idle |= _by_name(program, place, tally.idle)
    parameters += sum(codes.values())
    return Cost(
        parameters=parameters,
        activated_parameters=parameters - sum(idle.values()),
        weight_bytes=sum(t.numel() * t.element_size() for t in program.tensors.values()),
        flops=sum(kinds.values()),
        bytes_moved=sum(tally.bytes_moved for _, tally in path.places),
        by_kind=dict(sorted(kinds.items())),
        expected_flops=round(average.flops),
        state_bytes=_state_bytes(program, size),
        _places=[(place or "", tally) for place, tally in path.places],
        _stored=[(place or "", tally) for place, tally in stored],
    )


def _state_bytes(program: Program, size: Callable[[Size], int]) -> int:
    kept = {slot.input for slot in program.state}
    return sum(
        _bytes(node, size)
        for node in program.main.nodes
        if node.op == "placeholder" and node.name in kept
    )


class _Path:
    """A way through a program: at each choice the dearer branch; or both, by their shares."""

    def __init__(self, program: Program, tallies: Mapping[str, _Tally], *, dearest: bool) -> None:
        self.program, self.tallies, self.dearest = program, tallies, dearest
        self.places: list[tuple[str | None, _Tally]] = []
        self.flops = 0.0

    def walk(self, key: str, instance: str | None, share: float) -> None:
        """Add a graph, computed in this share of calls, and what it calls."""
        program = self.program
        self.places.append((instance, self.tallies[key]))
        self.flops += share * self.tallies[key].flops.total()
        for name in block_calls(program.graphs[key]):
            self.walk(program.instances[name].block, name, share)
        for node in choices(program.graphs[key]):
            often = None if self.dearest else share_of(program, node, instance)
            if often is None:
                self.walk(max(branches_of(node), key=self._below(instance)), instance, share)
            else:
                for branch, part in zip(branches_of(node), (often, 1 - often), strict=True):
                    self.walk(branch, instance, share * part)

    def _below(self, instance: str | None) -> Callable[[str], float]:
        def flops(branch: str) -> float:
            path = _Path(self.program, self.tallies, dearest=self.dearest)
            path.walk(branch, instance, 1.0)
            return path.flops

        return flops


def coded_weights(program: Program, graph: fx.Graph, instance: str | None) -> dict[str, int]:
    """Count the weights that a graph stores as codes, its branches apart, by the codes' name."""
    tally = _tally(graph, concrete(program, None))
    return _by_name(program, instance, tally.codes)


def _by_name(program: Program, instance: str | None, counts: Mapping[str, int]) -> dict[str, int]:
    names = program.instances[instance].weights if instance else {}
    return {names.get(slot, slot): count for slot, count in counts.items()}


def share_of(program: Program, choice: fx.Node, instance: str | None = None) -> float | None:
    """Return how often the first branch of a choice is computed, if the program says so.

    It does where the choice reads a stored table of flags, one per step, at an index.

    Returns:
        A share from 0 to 1, each entry of the table as likely; None when it depends on values.
    """
    predicate: Any = choice.args[0]
    if getattr(predicate.target, "overloadpacket", None) is not aten.index:
        return None
    table = predicate.args[0]
    if table.op != "get_attr" or table.meta["val"].dim() != 1:
        return None
    flags = program.weight(str(table.target), instance)
    return None if flags.is_meta else float(flags.double().mean())


def _at_paths(places: Iterable[tuple[str, Mapping[str, int]]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for place, counts in places:
        for path, count in counts.items():
            found[".".join(filter(None, (place, path)))] += count
    return dict(found)


def _tally(graph: fx.Graph, size: Callable[[Size], int]) -> _Tally:
    tally = _Tally()
    for node in graph.nodes:
        if node.op != "call_function" or is_view(node):
            continue
        shapes = [_shape(source, size) for source in tensor_arguments(node)]
        output = _shape(node, size)
        counts = node_flops(node, shapes, output)
        tally.kinds.update(counts)
        tally.flops[local_path(node)] += sum(counts.values())
        tally.bytes_moved += sum(_bytes(n, size) for n in (node, *tensor_arguments(node)))
        structural = OPS.get(str(node.target))
        if structural is not None:
            first = [str(slot.target) for slot in weights_read(node)[:1]]
            count = structural.weights(shapes, output)
            tally.coded[local_path(node)] += count
            tally.codes |= dict.fromkeys(first, count) if count else {}
        if structural is not None and structural.idle is not None:
            tally.idle.update(dict.fromkeys(first, structural.idle(shapes)))
    return tally


def node_flops(node: fx.Node, shapes: Sequence[Shape], output: Shape) -> Mapping[str, int]:
    """Return the FLOPs of one node by kind.

    Args:
        node: The node.
        shapes: Shapes of its tensor arguments, in order.
        output: Shape of its result, the first of several.
    """
    structural = OPS.get(str(node.target))
    if structural is not None:
        names = [argument.name for argument in structural.overload._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        sizes = {name: given[name] for name in structural.sizes}
        return structural.flops(list(shapes), output, **sizes)
    packet = getattr(node.target, "overloadpacket", None)
    size = math.prod(output)
    if packet in (aten.linear, aten.mm):
        return {"linear": 2 * size * shapes[0][-1]}
    if packet is aten.addmm:
        return {"linear": 2 * size * shapes[1][-1]}
    if packet in (aten.matmul, aten.bmm, aten.baddbmm):
        left = shapes[1] if packet is aten.baddbmm else shapes[0]
        return {_product_kind(node): 2 * size * left[-1]}
    if packet is aten.scaled_dot_product_attention:
        (*batch, queries, head_dim), keys, value = shapes[0], shapes[1][-2], shapes[2][-1]
        return {"attention": 2 * math.prod(batch) * queries * keys * (head_dim + value)}
    if packet in _CONVOLUTIONS:
        return {"convolution": 2 * size * math.prod(shapes[1][1:])}
    return {"elementwise": size}


def is_view(node: fx.Node) -> bool:
    """Whether a node only looks at memory in another way, or picks from a tuple."""
    if str(node.target) in OPS:
        return False
    if not isinstance(node.meta.get("val"), Tensor):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    return any(result.alias_info is not None for result in schema.returns)


def weights_read(node: fx.Node) -> list[fx.Node]:
    """Return the weights that a call reads, those that it reads through codes as codes."""
    found: list[fx.Node] = []
    for source in node.all_input_nodes:
        structural = OPS.get(str(source.target))
        if source.op == "get_attr":
            found.append(source)
        elif structural is not None and not structural.values:
            found += weights_read(source)
    return found


def _product_kind(node: fx.Node) -> str:
    """A product with a weight is a linear layer; one of two activations is attention."""
    return "linear" if any(n.op == "get_attr" for n in node.all_input_nodes) else "attention"


def tensor_arguments(node: fx.Node) -> list[fx.Node]:
    """Return tensor arguments in order; one that is given twice stands twice."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return [n for n in found if isinstance(n.meta.get("val"), Tensor)]


def results(value: Any) -> tuple[Tensor, ...]:
    """Return what an op gives as a tuple: several tensors, or the one there is."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _shape(node: fx.Node, size: Callable[[Size], int]) -> Shape:
    return tuple(size(s) for s in results(node.meta["val"])[0].shape)


def _bytes(node: fx.Node, size: Callable[[Size], int]) -> int:
    tensors = results(node.meta["val"])
    return sum(math.prod(map(size, t.shape)) * t.element_size() for t in tensors)
