"""Blocks of which one stream is no longer computed: what takes its place, and where.

In the first block of a group everything is as it was; m is what its attention reads of the stream,
c the stream behind it. In the others attention reads m + map(m), and nothing is added to the
stream; behind the last it is c + end(c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...ir.graphs import output_nodes, positions
from ...ir.program import Program
from ...ir.recognize import Attention, Block, Place
from ...ir.region_module import RegionModule
from ...ir.regions import Region, changed


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockGroup(Region):
    """The calls of some block instances, one after the other.

    Attributes:
        blocks: The blocks.
        calls: Their calls in the main graph.
    """

    blocks: tuple[Block, ...]
    calls: tuple[fx.Node, ...]
    kind: ClassVar[str] = "block group"

    @property
    def label(self) -> str:
        """The first and the last block."""
        return f"{self.blocks[0].instance}..{self.blocks[-1].instance}"

    @classmethod
    def of(cls, program: Program, blocks: Sequence[Block]) -> Self:
        """Return the group of blocks that are instances, each of which is one block."""
        calls = tuple(program.call(str(block.instance)) for block in blocks)
        order = positions(program.main)
        inside = {*calls, *(user for call in calls for user in call.users)}
        nodes = tuple(sorted(inside, key=order.__getitem__))
        read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
        seen = [n for n in nodes if n not in calls and not inside.issuperset(n.users)]
        return cls(
            path="",
            nodes=nodes,
            inputs=tuple(read),
            outputs=tuple(seen),
            program=program,
            blocks=tuple(blocks),
            calls=calls,
        )

    def objection(self, stream: int) -> str | None:
        """Say why a stream of the blocks cannot be left out, completing "the group ..."."""
        order = positions(self.program.main)
        if any(order[node] > order[self.calls[0]] for node in self.inputs):
            return "is interrupted: something is computed between its blocks"
        for block in self.blocks:
            if len(block.streams) <= stream or read_of(block, stream) is None:
                return f"has a block, {block.label}, whose attention reads no stream {stream} apart"
        return None


def read_of(block: Block, stream: int) -> fx.Node | None:
    """Return what the attention of a block makes queries, keys and values of, for one stream."""
    start = block.streams[stream].stream_in
    for sublayer in block.sublayers:
        if isinstance(sublayer.region, Attention) and len(sublayer.residuals) > 1:
            for way, read in zip(sublayer.residuals, sublayer.region.streams, strict=True):
                if way is not None and way.stream is start and read.x_q is read.x_k:
                    return read.x_q
    return None


def ends_of(group: BlockGroup, stream: int) -> dict[str, tuple[Place, Place]]:
    """Return what the maps of a group take and give, by their name."""
    first, *others = group.blocks
    (a, m), (z, _) = ((b.instance, read_of(b, stream)) for b in (first, others[-1]))
    assert m is not None
    found = {
        f"{b.instance}.stream_map": (Place(a, m), Place(b.instance, node))
        for b in others
        if (node := read_of(b, stream)) is not None
    }
    c, end = (b.streams[stream].stream_out for b in (first, others[-1]))
    if c is not None and end is not None:
        found[f"{z}.stream_end"] = Place(a, c), Place(z, end)
    return found


class WithoutStream(nn.Module):
    """A group of blocks that no longer computes one of its streams.

    Args:
        group: The blocks.
        stream: Which of their streams, counted from 0.
    """

    def __init__(self, group: BlockGroup, stream: int) -> None:
        super().__init__()
        self.group, self.stream = (group,), stream  # in a tuple: no part of how it is built
        for index, block in enumerate(group.blocks):
            self._put(str(block.instance), _computed(block, stream, first=index == 0))
        like = next(iter(self.parameters()))
        for name, (_, after) in ends_of(group, stream).items():
            self._put(name, Residual(int(after.node.meta["val"].shape[-1]), like))

    def forward(self, *inputs: Any) -> Any:
        (group,) = self.group
        env: dict[fx.Node, Any] = dict(zip(group.inputs, inputs, strict=True))
        kept: list[Tensor] = []
        for node in group.nodes:
            if node in group.calls:
                block = group.blocks[group.calls.index(node)]
                env[node] = self._call(block, [env[arg] for arg in node.args], kept)  # type: ignore[index]
            else:
                env[node] = env[node.args[0]][node.args[1]]  # type: ignore[index]
        found = tuple(env[node] for node in group.outputs)
        return found if len(found) > 1 else found[0]

    def _call(self, block: Block, args: list[Any], kept: list[Tensor]) -> list[Any]:
        """Return what a block returns; keep read and stream of the first."""
        (group,), name = self.group, str(block.instance)
        place = _place(block, self.stream)
        if not kept:
            *found, read = self.get_submodule(name)(*args)
            kept += [read, found[place]]
            return found
        read, stream = kept
        computed = self.get_submodule(name)
        found = computed(*args, self.get_submodule(f"{name}.stream_map")(read))
        found = list(found) if isinstance(found, tuple) else [found]
        if block is group.blocks[-1]:
            stream = self.get_submodule(f"{name}.stream_end")(stream)
        found.insert(place, stream)
        return found

    def _put(self, path: str, module: nn.Module) -> None:
        *outer, leaf = path.split(".")
        owner: nn.Module = self
        for part in outer:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.add_module(leaf, module)


class Residual(nn.Module):
    """x plus a linear map of x, at first zero."""

    def __init__(self, dim: int, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.new_zeros(dim, dim), requires_grad=False)
        self.bias = nn.Parameter(like.new_zeros(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, self.weight, self.bias)


def _computed(block: Block, stream: int, *, first: bool) -> RegionModule:
    """Return what is computed of a block's graph; the read of its attention given or returned."""
    graph = block.nodes[0].graph
    read = read_of(block, stream)
    assert read is not None
    results = output_nodes(graph)
    given = [node for node in graph.nodes if node.op == "placeholder"]
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    if first:
        results = [*results, read]
    else:
        results.pop(_place(block, stream))
        given, nodes = [*given, read], [node for node in nodes if node is not read]
    whole = changed(block, path="", nodes=tuple(nodes), inputs=tuple(given), outputs=tuple(results))
    return RegionModule(whole)


def _place(block: Block, stream: int) -> int:
    """Return which of a block graph's results a stream is."""
    out = block.streams[stream].stream_out
    assert out is not None
    return output_nodes(block.nodes[0].graph).index(out)
