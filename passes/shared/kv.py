"""Attention over keys and values that live from call to call.

    keys[position : position + seq] = k        values likewise        position += seq
    y = softmax(scale * q @ keys.T where key <= position + row) @ values

The buffers have `length` rows from the first call on, so shapes never change; what is not written
yet is masked. Positions that the model counts from 0 are counted from `position`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...ir.program import MAIN, Program
from ...ir.recognize import Attention
from ...ir.recognize.calls import LAYOUT, arguments, calls_to, op, readers, shape
from ...ir.regions import Region, local_path, unique_paths

POSITION, STARTS = "kv_position", "starts"  # state of main, argument


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedCore(Region):
    """The core of an attention with its keys and values.

    Attributes:
        attention: What it is the core of.
    """

    attention: Attention
    kind: ClassVar[str] = "attention"

    @classmethod
    def of(cls, attention: Attention) -> Self:
        """Return the core alone: queries, keys and values in, attended values out."""
        core = attention.core
        return cls(
            path=attention.path,
            nodes=(core,),
            inputs=tuple(core.args[:3]),  # type: ignore[arg-type]
            outputs=(core,),
            graph=attention.graph,
            instance=attention.instance,
            program=attention.program,
            attention=attention,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Counted(Region):
    """Positions 0, 1, 2, ... of the tokens of a call, or the rows of a table at them.

    Attributes:
        table: What rows are taken of; None for the positions themselves.
        axis: Axis of the rows.
    """

    table: fx.Node | None
    axis: int
    kind: ClassVar[str] = "positions"

    @property
    def rows(self) -> int | None:
        """How many positions the table has that rows are taken of, here or later; None for all."""
        if self.table is not None:
            return int(self.tensor(self.table).shape[self.axis])
        tables = [n.args[0] for n in _embedded(self.outputs[0]) if isinstance(n.args[0], fx.Node)]
        return min((int(shape(table)[0]) for table in tables), default=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Counter(Region):
    """How many tokens calls before have had, and whether there is room for those of this one.

    Attributes:
        axis: Axis of the tokens in the last input.
    """

    axis: int
    kind: ClassVar[str] = "counter"


class CachedAttention(nn.Module):
    """Attention to the keys and values of this call and of those before."""

    def __init__(
        self, length: int, window: int | None, scale: float | None, grouped: bool, padded: bool
    ) -> None:
        super().__init__()
        self.length, self.window, self.scale = length, window, scale
        self.grouped, self.padded = grouped, padded

    def forward(
        self,
        q: Float[Tensor, "batch heads seq head_dim"],
        k: Float[Tensor, "batch kv_heads seq head_dim"],
        v: Float[Tensor, "batch kv_heads seq value_dim"],
        position: Int[Tensor, ""],
        *rest: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        *starts, keys, values = rest
        rows = position + torch.arange(q.shape[-2], device=q.device)
        at = rows.clamp(max=self.length - 1)  # the counter tells of tokens there is no room for
        keys, values = keys.index_copy(-2, at, k), values.index_copy(-2, at, v)
        seen = self.seen(rows, *starts)
        y = F.scaled_dot_product_attention(
            q, keys, values, seen, scale=self.scale, enable_gqa=self.grouped
        )
        return y, keys, values

    def seen(
        self, rows: Int[Tensor, " seq"], *starts: Int[Tensor, " batch"]
    ) -> Bool[Tensor, "*batch seq length"]:
        """Return which keys each token sees: those up to itself, and in its row of the batch."""
        behind = rows[:, None] - torch.arange(self.length, device=rows.device)
        seen = behind >= 0
        if self.window is not None:
            seen = seen & (behind < self.window)
        if not self.padded:
            return seen
        own = torch.arange(self.length, device=rows.device) >= starts[0][:, None, None, None]
        return (seen & own) | (behind == 0)  # padding sees itself: no row of nothing


class CountedOn(nn.Module):
    """Positions from `position` on, or the rows of a table at them."""

    table: Tensor | None

    def __init__(self, length: int, table: Tensor | None, axis: int) -> None:
        super().__init__()
        self.length, self.axis = length, axis
        self.register_buffer("table", table)

    def forward(self, seq: int, position: Int[Tensor, ""]) -> Tensor:
        rows = (position + torch.arange(seq, device=position.device)).clamp(max=self.length - 1)
        return rows if self.table is None else self.table.index_select(self.axis, rows)


class Counting(nn.Module):
    """Count the tokens of a call; tell when they are more than there is room for."""

    def __init__(self, length: int, axis: int) -> None:
        super().__init__()
        self.length, self.axis = length, axis

    def forward(self, tokens: Tensor, position: Int[Tensor, ""]) -> tuple[Tensor, Tensor]:
        following = position + tokens.shape[self.axis]
        return following, (following > self.length).to(torch.int64)


def counted(
    program: Program, size: torch.SymInt, instances: Iterable[str | None]
) -> Iterator[Counted]:
    """Yield where a program counts the tokens of a call.

    Args:
        program: Where to look.
        size: How many tokens there are.
        instances: Block instances to look at, None for main.
    """
    for instance in instances:
        key = program.instances[instance].block if instance else MAIN
        found = [(node, *parts) for node in calls_to(program.graphs[key], ("arange", "slice"))
                 if (parts := _counted(node, size))]  # fmt: skip
        paths = unique_paths([f"{local_path(node)}.positions".lstrip(".") for node, *_ in found])
        for (node, count, table, axis), path in zip(found, paths, strict=True):
            yield Counted(
                path=path, nodes=(node,), inputs=(count,), outputs=(node,), graph=key,
                instance=instance, program=program, table=table, axis=axis,
            )  # fmt: skip


def _counted(node: fx.Node, size: torch.SymInt) -> tuple[fx.Node, fx.Node | None, int] | None:
    """Return the count behind `arange(count)` or `table[:count]`, with table and axis."""
    given = arguments(node)
    end = given.get("end")
    if given.get("start") not in (None, 0) or given.get("step", 1) != 1:
        return None
    if not isinstance(end, fx.Node) or not is_size(end.meta["val"], size):
        return None
    if op(node) == "arange":
        return end, None, 0
    table = given["self"]
    return (end, table, int(given.get("dim", 0))) if table.op == "get_attr" else None


def is_size(one: object, other: torch.SymInt) -> bool:
    """Whether something is the same dynamic size."""
    return isinstance(one, torch.SymInt) and one.node.expr == other.node.expr


def _embedded(positions: fx.Node) -> list[fx.Node]:
    """Return the tables that rows are taken of at some positions, however laid out."""
    found, pending = [], [positions]
    while pending:
        for reader in readers(pending.pop()):
            if op(reader) == "embedding":
                found.append(reader)
            elif op(reader) in LAYOUT:
                pending.append(reader)
    return found
