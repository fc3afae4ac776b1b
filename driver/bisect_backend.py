"""Find what an engine gets wrong: the block, then the op, by lowering prefixes of the model.

A prefix ends at a node and returns every value that later nodes read. If one prefix is within the
bound and the prefix one op longer is not, that op was given right values and returned a wrong one.
A prefix is lowered as a model of its own: where a backend fuses across its end, it may behave
otherwise than inside the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..backends.base import Backend
from ..ir.cut import live_values, prefix
from ..ir.flatten import flatten
from ..ir.graphs import output_nodes
from ..ir.program import Program
from ..ir.recognize import Block
from ..ir.regions import find_once, local_path
from ..ir.run import run
from .bisect import Progress
from .bisect_op import spelled
from .bisect_search import Bound, Measured, crossing, worst_of
from .numerics import Inputs


@dataclass(frozen=True)
class WrongOp:
    """An op that an engine computes from right values and gets wrong.

    Attributes:
        block: Label of its block; empty outside of all.
        path: Its module path.
        node: The node, in the flat program.
        before: Error of the prefix that ends before it.
        after: Error of the prefix that ends with it.
    """

    block: str
    path: str
    node: fx.Node
    before: Measured
    after: Measured

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        sources = self.node.meta.get("from_node") or []
        return {
            "block": self.block,
            "path": self.path,
            "op": spelled(self.node),
            "made_by": sources[-1].pass_name if sources else None,
            "error": {"before": self.before.error, "after": self.after.error},
        }


@dataclass(frozen=True)
class EngineBisection:
    """What a bisection of an engine found.

    Attributes:
        backend: Its name.
        bound: What was asked for.
        error: Error of the whole model against the reference.
        culprit: The op; None when the whole model stays within the bound.
        lowered: How many programs were lowered.
        program: The flat program the node is in.
    """

    backend: str
    bound: Bound
    error: float
    culprit: WrongOp | None
    lowered: int
    program: Program

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "within": self.culprit is None,
            "backend": self.backend,
            "metric": self.bound.metric,
            "bound": self.bound.limit,
            "error": self.error,
            "lowered": self.lowered,
            "culprit": self.culprit.to_json() if self.culprit else None,
        }


def bisect_backend(
    program: Program,
    backend: Backend,
    inputs: Sequence[Inputs],
    bound: Bound,
    *,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> EngineBisection:
    """Find the op an engine gets wrong, compared with the reference run of the same program.

    It takes 1 + log2(blocks) + log2(ops in a block) lowerings, each logarithm rounded up.

    Args:
        program: What to lower.
        backend: Where.
        inputs: Flat inputs in the order of main's placeholders, one or more sets.
        bound: How far values may be off.
        options: Options of the backend.
        progress: Called with (what runs, programs lowered, 0).

    Raises:
        LoweringError: The backend cannot lower the program or a prefix of it.
    """
    flat = flatten(program)
    engine = _Engine(flat, backend, inputs, bound, options or {}, progress)
    labels = _labels(flat)
    ends = _ends(flat, labels)
    whole = engine.upto(ends[-1]) if ends else Measured(0.0, False)
    if not whole.beyond:
        return EngineBisection(backend.name, bound, whole.error, None, engine.lowered, flat)
    place = crossing(lambda n: engine.upto(ends[n - 1]).beyond, 0, len(ends))
    steps = _steps(flat, ends[place - 2] if place > 1 else None, ends[place - 1])
    last = crossing(lambda n: engine.upto(steps[n - 1]).beyond, 0, len(steps))
    node = steps[last - 1]
    before = steps[last - 2] if last > 1 else ends[place - 2] if place > 1 else None
    start = engine.upto(before) if before else Measured(0.0, False)
    path = ".".join(filter(None, (node.meta.get("instance"), local_path(node))))
    culprit = WrongOp(labels.get(node, ""), path, node, start, engine.upto(node))
    return EngineBisection(backend.name, bound, whole.error, culprit, engine.lowered, flat)


class _Engine:
    """Lowers prefixes and measures them, each once."""

    def __init__(
        self,
        flat: Program,
        backend: Backend,
        inputs: Sequence[Inputs],
        bound: Bound,
        options: Mapping[str, Any],
        progress: Progress | None,
    ) -> None:
        self.flat, self.backend, self.inputs, self.bound = flat, backend, inputs, bound
        self.options, self.progress = options, progress
        self.known: dict[fx.Node, Measured] = {}

    @property
    def lowered(self) -> int:
        return len(self.known)

    def upto(self, node: fx.Node) -> Measured:
        if node not in self.known:
            if self.progress:
                self.progress(f"lower to {self.backend.name}", self.lowered, 0)
            piece = prefix(self.flat, live_values(self.flat.main, node))
            self.known[node] = measure_lowered(
                piece, self.backend, self.inputs, self.bound, self.options
            )
        return self.known[node]


def measure_lowered(
    program: Program,
    backend: Backend,
    inputs: Sequence[Inputs],
    bound: Bound,
    options: Mapping[str, Any],
) -> Measured:
    """Lower a program and compare it with the reference run, on the worst of the inputs."""
    lowered = backend.lower(program, options)
    found: list[Measured] = []
    for flat in inputs:
        values, expected = lowered.run(flat), run(program, flat)
        exact = bound.metric == "rounding"
        truth = run(program, flat, dtype=torch.float64) if exact else [None] * len(expected)
        checks = zip(values, expected, truth, strict=True)
        found.append(worst_of([bound.check(*each) for each in checks]))
    return worst_of(found)


def _labels(flat: Program) -> dict[fx.Node, str]:
    """Name the block of each node: its instance before flattening, or its residual block."""
    labels: dict[fx.Node, str] = {}
    for block in find_once(flat.main, Block):
        labels.update(dict.fromkeys(block.nodes, block.path))
    folded = {n: n.meta["instance"] for n in flat.main.nodes if "instance" in n.meta}
    return folded or labels


def _ends(flat: Program, labels: Mapping[fx.Node, str]) -> list[fx.Node]:
    """Return the last op of every block, and the last of all, in graph order."""
    last: dict[str, fx.Node] = {}
    for node in _computed(flat):
        if node in labels:
            last[labels[node]] = node
    ends = {*last.values(), *_computed(flat)[-1:]}
    return [node for node in _computed(flat) if node in ends]


def _steps(flat: Program, after: fx.Node | None, upto: fx.Node) -> list[fx.Node]:
    """Return the ops after one and up to another."""
    nodes = _computed(flat)
    start = nodes.index(after) + 1 if after is not None else 0
    return nodes[start : nodes.index(upto) + 1]


def _computed(flat: Program) -> list[fx.Node]:
    """Return the ops whose result a prefix can return."""
    kept = set(output_nodes(flat.main))
    return [
        node
        for node in flat.main.nodes
        if node.op == "call_function"
        and isinstance(node.meta.get("val"), torch.Tensor)
        and (node.users or node in kept)
    ]
