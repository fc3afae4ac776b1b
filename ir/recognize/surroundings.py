"""What lies around the blocks of a program: before, between, behind and beside them.

    embedding    computed before all blocks, for a stream
    condition    computed before all blocks, for something else that blocks read: masks, rotations,
                 the vector of a time step
    transition   made of streams, and read by blocks again: merged patches, joined streams
    head         read by the result alone

Both questions, what a node is made of and who reads it in the end, take one pass over the graph.
A connected part has a role only if it is plain enough for one; others are no surroundings but what
was not recognised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..graphs import argument_positions, output_nodes
from ..program import MAIN, Program
from ..regions import find_once
from .attention import Attention
from .block import Block
from .calls import CARRYING, op
from .flow import NotRecognized, flow_of
from .path import value_of
from .plain import HANDFUL, oddity_of
from .sublayer import sublayers_of

EMBEDDING, CONDITION, TRANSITION, HEAD = "embedding", "condition", "transition", "head"
_STREAM, _BESIDE, _RESULT = 1, 2, 4


@dataclass(frozen=True)
class Surroundings:
    """Roles of the nodes of all graphs that are in no block.

    Attributes:
        roles: Role of each node, calls of classes without blocks among them.
        behind: The nodes that are made of a stream.
        main: The main graph.
        odd: For each connected part that has no role the first node that speaks against it.
    """

    roles: Mapping[fx.Node, str]
    behind: Set[fx.Node]
    main: fx.Graph
    odd: Sequence[NotRecognized] = ()

    def components(self, role: str) -> list[list[fx.Node]]:
        """Return what computes something for a role in the main graph, in connected groups."""
        nodes = [n for n, r in self.roles.items() if r == role and n.op == "call_function"]
        return connected([n for n in nodes if n.graph is self.main])


def surroundings_of(program: Program) -> Surroundings:
    """Return the roles of what lies around the blocks; no node has one without blocks."""
    streams = {key: _stream_arguments(graph) for key, graph in program.graphs.items()}
    calls = {n: streams[program.instances[str(n.target)].block] for n in program.calls()}
    roles: dict[fx.Node, str] = {}
    behind: set[fx.Node] = set()
    if not find_once(program.main, Block) and not any(calls.values()):
        return Surroundings(roles, behind, program.main)
    _classify(program.main, calls, set(), roles, behind)
    for key, graph in program.graphs.items():
        if key == MAIN or not streams[key]:
            continue
        places = argument_positions(graph)
        given = {node for node, index in places.items() if index in streams[key]}
        _classify(graph, {}, given, roles, behind)
    odd = list(_sort_out(program, {n: r for n, r in roles.items() if r}, behind))
    roles = {node: role for part, role, found in odd if not found for node in part}
    return Surroundings(roles, behind, program.main, [found for *_, found in odd if found])


Part = tuple[list[fx.Node], str, NotRecognized | None]


def _sort_out(
    program: Program, roles: Mapping[fx.Node, str], behind: Set[fx.Node]
) -> Iterable[Part]:
    """Yield the connected parts with their roles, and what speaks against the role."""
    for key, graph in program.graphs.items():
        of_role: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            if node in roles:
                of_role.setdefault(roles[node], []).append(node)
        for role, nodes in of_role.items():
            for part in connected(nodes):
                calls = {n: _contents(program, n) for n in part if n.op == "call_module"}
                streams = behind if role == TRANSITION else frozenset[fx.Node]()
                longest = 0 if streams and key != MAIN else HANDFUL  # none between equal blocks
                odd = oddity_of(
                    part, role, is_class=key != MAIN, calls=calls, streams=streams, longest=longest
                )
                within = dict.fromkeys(n for contents in calls.values() for n in contents)
                yield [*part, *within], role, odd


def _contents(program: Program, call: fx.Node) -> list[fx.Node]:
    """Return what a class computes, attentions and blocks apart."""
    graph = program.graphs[program.instances[str(call.target)].block]
    found = (*find_once(graph, Attention), *find_once(graph, Block))
    known = {n for region in found for n in region.nodes}
    return [n for n in graph.nodes if n not in known]


def _classify(
    graph: fx.Graph,
    calls: Mapping[fx.Node, set[int]],
    given: set[fx.Node],
    roles: dict[fx.Node, str],
    behind: set[fx.Node],
) -> None:
    """Add the roles of one graph's nodes, and which of them are made of a stream.

    Args:
        graph: The graph.
        calls: Which arguments of its calls are streams.
        given: Its placeholders that are streams; in a class, what it returns is read by others.
        roles: Where roles are added.
        behind: Where nodes made of a stream are added.
    """
    blocks = find_once(graph, Block)
    inside = {n for block in blocks for n in block.nodes}
    inside |= {n for attention in find_once(graph, Attention) for n in attention.nodes}
    modulating = {n for b in blocks if b.modulation for n in b.modulation.nodes}
    working = {n for s in sublayers_of(graph) for n in s.region.nodes}
    streams = {value_of(s.stream_in) for block in blocks for s in block.streams}
    behind |= given
    for node in graph.nodes:
        made = node in working or bool(calls.get(node))
        if made or (node not in modulating and not behind.isdisjoint(node.all_input_nodes)):
            behind.add(node)
    reach: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        if node in inside:
            continue
        end = _STREAM if given and node in behind else _BESIDE if given else _RESULT
        reach[node] = 0
        for user in node.users:
            if user.op == "output":
                reach[node] |= end
            elif calls.get(user):
                streaming = {user.args[i] for i in calls[user]}
                reach[node] |= _STREAM if node in streaming else _BESIDE
            elif user in inside:
                reach[node] |= _STREAM if value_of(node) in streams else _BESIDE
            else:
                reach[node] |= reach[user]
        if node.op in ("call_function", "call_module"):
            roles[node] = "" if calls.get(node) else _role(node in behind, reach[node])


def _role(made_of_stream: bool, reach: int) -> str:
    if not reach:
        return ""
    if reach == _RESULT:
        return HEAD
    if made_of_stream:
        return TRANSITION
    return EMBEDDING if reach & _STREAM else CONDITION


def _stream_arguments(graph: fx.Graph) -> set[int]:
    """Return which arguments of a class are streams of its blocks."""
    places = argument_positions(graph)
    pending = [value_of(s.stream_in) for block in find_once(graph, Block) for s in block.streams]
    seen, flow = set(pending), flow_of(graph)
    for node in pending:  # grows while it is walked
        norm = flow.norm_to.get(node)
        sources = node.all_input_nodes if op(node) in CARRYING | {"cat", "add"} else []
        sources = [norm.inputs[0]] if norm else sources
        pending += [source for source in sources if source not in seen]
        seen.update(sources)
    return {places[node] for node in seen if node in places}


def connected(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Group nodes by which of them read each other, in order."""
    parent: dict[fx.Node, fx.Node] = {node: node for node in nodes}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in nodes:
        for source in node.all_input_nodes:
            if source in parent:
                parent[root(source)] = root(node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        groups.setdefault(root(node), []).append(node)
    return list(groups.values())


def as_region(nodes: list[fx.Node]) -> dict[str, Any]:
    """Return nodes, inputs and outputs of a set of nodes of the main graph."""
    inside = set(nodes)
    read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes)
    results = set(output_nodes(nodes[0].graph))
    ends = [n for n in nodes if not inside.issuperset(n.users) or n in results]
    return {
        "nodes": tuple(nodes),
        "inputs": tuple(n for n in read if n not in inside and n.op != "get_attr"),
        "outputs": tuple(ends),
        "graph": MAIN,
    }
