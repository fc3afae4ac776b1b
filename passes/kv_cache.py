"""Keep the keys and values of a decoder's tokens, so that a call computes its new tokens alone.

    session = engine.session()                 session(prompt)  ->  logits of the prompt
                                               session(token)   ->  logits of one token, and so on

One program serves the prompt and what follows; a session owns the cache. Every call continues where
the one before stopped: the same logits as one call with all tokens gives at these positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ir.arguments import with_argument
from ..ir.errors import OptionError, VerifyError
from ..ir.graphs import argument_positions, output_nodes
from ..ir.program import Program
from ..ir.recognize import Attention
from ..ir.recognize.calls import arguments, op, shape
from ..ir.regions import Region
from ..ir.run import run
from ..ir.state import State, shared, threaded, threads, with_state
from .base import Pass, Plan, Promise, Skip
from .shared.kv import (
    POSITION,
    STARTS,
    CachedAttention,
    CachedCore,
    Counted,
    CountedOn,
    Counter,
    Counting,
    counted,
    is_size,
)

KEYS, VALUES, FULL = "keys", "values", "kv_full"
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # others: a few roundings of their type


@dataclass(frozen=True, kw_only=True)
class KVCache(Pass[Region, int]):
    """Let a causal decoder continue where its last call stopped.

    The program keeps state, so engines are called through `engine.session()`.

    Attributes:
        length: Tokens there is room for, those of the prompt included.
        padded: Add an argument `starts`, int64 [batch]: where the tokens of each row begin. Shorter
            prompts are padded on the left with any tokens; what comes before is not looked at.

    Raises:
        OptionError: `length` is below 1.

    Source: Pope et al., 2022, arXiv:2211.05102, section 2.1 (keys and values cached in decoding).
    Differs: buffers of fixed length, what is not written yet being masked. Padding is for rotary
        positions, whose attention depends on distances alone.
    Exact when: always; calls of any lengths give what one call of all tokens gives.
    """

    name: ClassVar[str] = "kv-cache"
    promise: ClassVar[Promise] = Promise.EXACT
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"length": 32},)
    length: int
    padded: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise OptionError(f"{self.name}: length={self.length} has room for no token.")

    def prepared(self, program: Program) -> Program:
        """Give attentions state, if all of them can be cached."""
        found = cacheable(program)
        if not found or any(self.reason(attention) for attention in found):
            return program
        full = (f"the cache has room for {self.length} tokens, and this call has more.",)
        states = [State(POSITION, dtype=torch.int64), State(FULL, dtype=torch.int64, faults=full)]
        for attention in found:
            for name, side in (KEYS, 1), (VALUES, 2):
                batch, heads, _, width = shape(attention.core.args[side])  # type: ignore[arg-type]
                size = (int(batch), int(heads), self.length, int(width))
                dtype = attention.core.args[side].meta["val"].dtype  # type: ignore[union-attr]
                states.append(
                    State(_named(attention, name), size, dtype, instance=attention.instance)
                )
        blocks = dict.fromkeys(a.instance for a in found if a.instance is not None)
        program = with_state(program, states)
        program = shared(program, _input(program, POSITION), blocks)
        if self.padded:
            batch = int(shape(found[0].core.args[0])[0])  # type: ignore[arg-type]
            program = shared(with_argument(program, STARTS, shape=(batch,)), STARTS, blocks)
        return program

    def regions(self, program: Program) -> Iterator[Region]:
        """Yield the attentions with their caches, what counts tokens, and the counter of calls."""
        found = cacheable(program)
        if not any(slot.name == POSITION for slot in program.state):
            yield from found
            return
        position = _input(program, POSITION)
        reads = (position, STARTS) if self.padded else (position,)
        for attention in found:
            cache = _named(attention, KEYS), _named(attention, VALUES)
            yield threaded(CachedCore.of(attention), (*reads, *cache), cache)
        blocks = dict.fromkeys([None, *(attention.instance for attention in found)])
        for region in counted(program, _tokens(program), blocks):
            yield threaded(region, (position if region.instance else POSITION,))
        yield _counter(program)

    def decide(self, region: Region) -> int | Skip:
        reason = self.reason(region) if isinstance(region, Attention) else None
        if isinstance(region, Counted) and region.rows is not None and region.rows < self.length:
            reason = f"has {region.rows} positions, the cache {self.length}"
        return Skip(reason, at=region) if reason else self.length

    def plan(self, program: Program, evidence: Any = None) -> Plan[int]:
        """Decide for all or none: what is not cached would see the tokens of its call alone."""
        plan = super().plan(program, evidence)
        return Plan({}, plan.skips) if plan.skips else plan

    def reason(self, attention: Attention) -> str | None:
        """Say why an attention cannot be cached."""
        core = attention.core
        if op(core) != "scaled_dot_product_attention":
            return "is spelled out; run canonicalize first"
        if attention.source != "self":
            return f"is {attention.source} attention"
        if attention.mask not in ("causal", "window"):
            return f"has the mask {attention.mask!r}; it must be causal, and nothing else"
        batch, *_, seq, _ = shape(core)
        if not isinstance(seq, torch.SymInt) or not seq.node.expr.is_Symbol:
            return "is captured for one length; capture with a dynamic one, dynamic_shapes=..."
        if isinstance(batch, torch.SymInt):
            return "is captured for any batch; capture with the batch you need"
        name = attention.program.signature.symbols.get(str(seq.node.expr), "")
        least = attention.program.signature.ranges.get(name, (0, None))[0]
        if least > 1:
            return f"is captured for {least} tokens or more; capture with a Dim of min=1"
        if attention.program.sizes().get(name, 0) > self.length:
            return f"is captured with more tokens than the {self.length} there is room for"
        if self.padded and not attention.rotary:
            return "has no rotary positions, so rows cannot begin at different places"
        return None

    def replace(self, region: Region, decision: int) -> nn.Module:
        if isinstance(region, Counter):
            return Counting(decision, region.axis)
        if isinstance(region, Counted):
            table = None if region.table is None else region.tensor(region.table)
            return CountedOn(decision, table, region.axis)
        assert isinstance(region, CachedCore)
        given = arguments(region.attention.core)
        return CachedAttention(
            decision,
            region.attention.window,
            given.get("scale"),
            bool(given.get("enable_gqa")),
            self.padded,
        )

    def statistics(self, plan: Plan[int]) -> Mapping[str, int]:
        return {"tokens": self.length}

    def check(self, old: Program, new: Program, inputs: Sequence[Tensor]) -> None:
        """Compare calls of a few tokens each with one call of all tokens.

        Raises:
            VerifyError: They differ: something counts or mixes tokens in a way that was not seen.
        """
        size = _tokens(old)
        axes = [_axis(node.meta["val"], size) for node in argument_positions(old.main)]
        length = next(x.shape[i] for x, i in zip(inputs, axes, strict=True) if i is not None)
        first = max(1, length // 2)
        pieces = [(0, first), *((i, i + 1) for i in range(first, min(first + 2, length)))]
        whole, found = run(old, inputs), _continued(new, inputs, axes, pieces)
        for node, expected, parts in zip(output_nodes(old.main), whole, found, strict=False):
            axis = _axis(node.meta["val"], size)
            if axis is None:
                continue
            got = torch.cat(parts, axis)
            error = _relative(got, expected.narrow(axis, 0, got.shape[axis]))
            if error > _TOLERANCE.get(got.dtype, 0.05):
                raise VerifyError(
                    f"{self.name}: token by token the model gives something else than at once"
                    f" (relative error {error:.1e}).",
                    where=node.name,
                    remedy="give positions as an input of the model, or report the model.",
                )


def cacheable(program: Program) -> list[Attention]:
    """Return the attentions of tokens among themselves."""
    return [attention for attention in program.attentions() if attention.source != "cross"]


def _tokens(program: Program) -> torch.SymInt:
    """Return the size that counts the tokens of a call."""
    size = shape(cacheable(program)[0].core)[-2]
    assert isinstance(size, torch.SymInt)
    return size


def _continued(
    program: Program,
    inputs: Sequence[Tensor],
    axes: Sequence[int | None],
    pieces: Sequence[tuple[int, int]],
) -> list[list[Tensor]]:
    """Return what each output is in calls of some of the tokens each, one after the other."""
    state, added = program.initial_state(), _starts(program, len(inputs))
    results: list[list[Tensor]] = []
    for begin, end in pieces:
        part = [
            x if axis is None else x.narrow(axis, begin, end - begin)
            for x, axis in zip(inputs, axes, strict=True)
        ]
        results.append(run(program, program.arranged([*part, *added], state)))
        state = {slot.name: results[-1][slot.output] for slot in program.state}
    return [list(parts) for parts in zip(*results, strict=True)]


def _starts(program: Program, known: int) -> list[Tensor]:
    """Return the arguments that the pass has added: rows that all begin at once."""
    specs = program.signature.inputs[known:]
    return [torch.zeros([int(n) for n in spec.shape], dtype=spec.dtype) for spec in specs]


def _relative(got: Tensor, expected: Tensor) -> float:
    scale = expected.double().norm().clamp(min=torch.finfo(torch.float64).tiny)
    return float((got.double() - expected.double()).norm() / scale)


def _axis(value: object, size: torch.SymInt) -> int | None:
    """Return the axis of a value that runs over the tokens of a call."""
    sizes = value.shape if isinstance(value, Tensor) else ()
    alike = (i for i, s in enumerate(sizes) if is_size(s, size))
    return next(alike, None)


def _named(attention: Attention, what: str) -> str:
    return f"{attention.path}.{what}"


def _input(program: Program, slot: str) -> str:
    """Return main's placeholder of a state."""
    return next(s.input for s in program.state if s.name == slot)


def _counter(program: Program) -> Counter:
    """Return where main says how many tokens there were."""
    size, known = _tokens(program), threads(program)
    tokens, axis = next(
        (node, axis)
        for node in argument_positions(program.main)
        if (axis := _axis(node.meta["val"], size)) is not None
    )
    following = tuple(n for name in (POSITION, FULL) if (n := known[name].following) is not None)
    return Counter(
        path=POSITION, nodes=following, inputs=(tokens, known[POSITION].current),
        outputs=following, program=program, axis=axis,
    )  # fmt: skip
