"""What two programs are compared by: blocks, each with its parts in words and what it costs.

A unit is a block instance, a residual block of the main graph, or everything outside of blocks.
What it is made of is found once per class. Regions say what they are by their constants, structural
ops by `describe`; a new kind of either appears here without being named.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.cost import is_view, node_flops
from ..ir.ops import OPS
from ..ir.program import MAIN, Program
from ..ir.recognize import Attention, Block, FeedForward
from ..ir.recognize.explain import KINDS
from ..ir.regions import Region, find_once, local_path, unique_paths
from ..ir.shapes import concrete, dims

OUTSIDE = "outside blocks"
_ROLES = {"feed_forward": "FFN"}
_MAIN_CONSTANT = {"feed_forward": "ffn_dim"}  # said without its name
_SAMPLE = 4096  # elements of a tensor that tell blocks apart
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class Part:
    """A part of a unit.

    Attributes:
        role: What it is: `attention`, `FFN`, `linear layers`, ...
        words: Which one: `12 heads x 64`, `int8 weights (group 32)`.
        path: Module path below the unit.
        constants: Constants of the role, where it has some; "" names the main one.
        flops: Operations of its nodes.
        size_bytes: Bytes of the tensors they read.
        within: Role of the region a layer belongs to; empty for regions and loose layers.
    """

    role: str
    words: str
    path: str
    constants: Mapping[str, Any]
    flops: int
    size_bytes: int
    within: str = ""


@dataclass(frozen=True)
class Body:
    """What all instances of a class share.

    Attributes:
        parts: Regions, linear layers and structural ops, in execution order.
        loose: Ops of no recognised region, by name; views left out.
        ops: All ops by name.
        structure: Hash of the nodes, names left out.
        slots: Tensors the nodes read, as the graph names them.
        flops: Operations of one call.
    """

    parts: tuple[Part, ...]
    loose: Counter[str]
    ops: Counter[str]
    structure: str
    slots: tuple[str, ...]
    flops: int


@dataclass(frozen=True, eq=False)
class Unit:
    """A block, or what is outside of all.

    Attributes:
        label: Path of the block in the model.
        body: What it is made of.
        weights: Its tensors by their name below the block.
    """

    label: str
    body: Body
    weights: Mapping[str, Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.numel() * t.element_size() for t in self.weights.values())

    def fingerprint(self) -> str | None:
        """Hash structure and a sample of every weight; None for a block without weights."""
        if not self.weights or any(tensor.is_meta for tensor in self.weights.values()):
            return None
        digest = hashlib.sha256(self.body.structure.encode())
        for name in sorted(self.weights):
            sample = self.weights[name].detach().cpu().reshape(-1)[:_SAMPLE].contiguous()
            digest.update(name.encode() + bytes(sample.view(torch.uint8).numpy().data))
        return digest.hexdigest()


def units(program: Program) -> tuple[list[Unit], Unit]:
    """Return the blocks of a program in execution order, and what is outside of them."""
    bodies: dict[str, Body] = {}
    found: list[tuple[str | None, str, Sequence[fx.Node]]] = []
    outside = dict.fromkeys(n for n in program.main.nodes if n.op == "call_function")
    blocks = {block.nodes[0]: block for block in find_once(program.main, Block)}
    for node in program.main.nodes:
        if node in blocks:
            block = blocks[node]
            found.append((None, block.path, block.nodes))
            for inner in block.nodes:
                outside.pop(inner, None)
        if node.op == "call_module":
            name = str(node.target)
            key = program.instances[name].block
            found.append((name, name, list(program.graphs[key].nodes)))
    made = []
    for instance, label, nodes in found:
        key = program.instances[instance].block if instance else label
        if key not in bodies or not instance:
            bodies[key] = _body(program, instance, nodes, label)
        made.append(Unit(label, bodies[key], _weights(program, instance, label, bodies[key].slots)))
    rest = _body(program, None, list(outside), "")
    return made, Unit(OUTSIDE, rest, _weights(program, None, "", rest.slots))


def _weights(
    program: Program, instance: str | None, label: str, slots: Iterable[str]
) -> dict[str, Tensor]:
    prefix = "" if instance else f"{label}."
    return {slot.removeprefix(prefix): program.weight(slot, instance) for slot in slots}


def _body(program: Program, instance: str | None, nodes: Sequence[fx.Node], label: str) -> Body:
    graph = program.graphs[program.instances[instance].block if instance else MAIN]
    work = [n for n in nodes if n.op == "call_function" and not _picks_from_call(n)]
    inside, count = set(work), _Counter(program, instance)
    kept = [r for kind in KINDS if kind is not Block for r in find_once(graph, kind)]
    regions = [r.bind(program, MAIN, instance) for r in kept if inside.issuperset(r.nodes)]
    held = {node for region in regions for node in region.nodes}
    ops = Counter(_name(node) for node in work if not is_view(node) and not _is_layer(node))
    loose = Counter(_name(n) for n in work if not is_view(n) and not _is_layer(n) and n not in held)
    parts = [*map(count.region, regions), *count.joined(regions), *count.layers(work, regions)]
    prefix = "" if instance else f"{label}."
    return Body(
        parts=tuple(dataclasses.replace(p, path=p.path.removeprefix(prefix)) for p in parts),
        loose=loose,
        ops=ops,
        structure=_structure(program, work, instance),
        slots=tuple(dict.fromkeys(str(n.target) for n in _read(work))),
        flops=sum(map(count.flops, work)),
    )


class _Counter:
    """Describes parts and counts what they cost."""

    def __init__(self, program: Program, instance: str | None) -> None:
        self.program, self.instance = program, instance
        self.size = concrete(program, None)

    def flops(self, node: fx.Node) -> int:
        if is_view(node):
            return 0
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        shapes = [tuple(map(self.size, n.meta["val"].shape)) for n in (*tensors, node)]
        return sum(node_flops(node, shapes[:-1], shapes[-1]).values())

    def part(
        self, role: str, words: str, path: str, nodes: Sequence[fx.Node], constants: Any = None
    ) -> Part:
        tensors = [self.program.weight(str(n.target), self.instance) for n in _read(nodes)]
        size_bytes = sum(t.numel() * t.element_size() for t in tensors)
        return Part(role, words, path, constants or {}, sum(map(self.flops, nodes)), size_bytes)

    def region(self, region: Region) -> Part:
        constants = constants_of(region)
        role = _role_of(region)
        words = _words(region, constants)
        main = _MAIN_CONSTANT.get(region.kind)
        named = {"" if name == main else name: value for name, value in constants.items()}
        nodes = [n for n in region.nodes if n.op == "call_function"]
        return self.part(role, words, region.path, nodes, named)

    def layers(self, nodes: Sequence[fx.Node], regions: Sequence[Region]) -> list[Part]:
        """Describe linear layers and structural ops."""
        owners = {node: _role_of(region) for region in regions for node in region.nodes}
        found = [node for node in nodes if _is_layer(node)]
        paths = unique_paths([local_path(node) for node in found])
        return [
            dataclasses.replace(self.part(*_layer(node), path, [node]), within=owners.get(node, ""))
            for node, path in zip(found, paths, strict=True)
        ]

    def joined(self, regions: Sequence[Region]) -> Iterator[Part]:
        """Say which projections are one matrix product."""
        for region in regions:
            layers: list[tuple[str, Any]] = []
            if isinstance(region, Attention):
                layers = [("q", region.query), ("k", region.key), ("v", region.value)]
            elif isinstance(region, FeedForward) and region.gate_layer:
                layers = [("gate", region.gate_layer), ("up", region.up_layer)]
            known = [(name, layer.node) for name, layer in layers if layer is not None]
            if len(known) > 1:
                one = len({node for _, node in known}) == 1
                role = "/".join(name for name, _ in known)
                yield self.part(role, "joined" if one else "separate", region.path, [])


def _role_of(region: Region) -> str:
    return _ROLES.get(region.kind, region.kind.replace("_", " "))


def constants_of(region: Region) -> dict[str, Any]:
    """Return the constants of a region's role: its own account, or its plain attributes."""
    own = getattr(region, "constants", None)
    if own is not None:
        return dict(own())
    shared = {f.name for f in dataclasses.fields(Region)}
    values = {f.name: getattr(region, f.name) for f in dataclasses.fields(region)
              if f.name not in shared}  # fmt: skip
    return {n: v for n, v in values.items() if isinstance(v, int | float | str | bool)}


def _words(region: Region, constants: Mapping[str, Any]) -> str:
    if isinstance(region, Attention):
        return f"{region.heads} heads x {region.head_dim}"
    main = _MAIN_CONSTANT.get(region.kind)
    if main:
        return str(constants[main])
    return ", ".join(str(v) for v in constants.values() if isinstance(v, str)) or "dense"


def _layer(node: fx.Node) -> tuple[str, str]:
    """Return role and words of a linear layer or a structural op."""
    structural = OPS.get(str(node.target))
    if structural is None:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        dtype = weight.meta["val"].dtype
        return "linear layers", _TYPES.get(dtype, str(dtype).removeprefix("torch."))
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return structural.describe(
        {k: v.meta["val"] if isinstance(v, fx.Node) else v for k, v in given.items()}
    )


def _structure(program: Program, nodes: Sequence[fx.Node], instance: str | None) -> str:
    """Hash ops, arguments and shapes; values are numbered as they come, weights by shape."""
    numbers: dict[fx.Node, int] = {}
    symbols = program.signature.symbols

    def argument(node: fx.Node) -> str:
        if node.op == "get_attr":
            tensor = program.weight(str(node.target), instance)
            return f"w{tuple(tensor.shape)}{tensor.dtype}"
        return f"v{numbers.setdefault(node, len(numbers))}"

    digest = hashlib.sha256()
    for node in nodes:
        args = fx.node.map_arg((node.args, node.kwargs), argument)
        value = node.meta.get("val")
        shape = dims(value, symbols) if isinstance(value, Tensor) else ""
        numbers.setdefault(node, len(numbers))
        digest.update(f"{node.target} {args} {shape} {getattr(value, 'dtype', '')}\n".encode())
    return digest.hexdigest()


def _read(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the weights that nodes read, each once."""
    return list(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s.op == "get_attr"))


def _is_layer(node: fx.Node) -> bool:
    return node.target is _LINEAR or str(node.target) in OPS


def _picks_from_call(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and source.op == "call_module" and len(node.args) == 2


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]
