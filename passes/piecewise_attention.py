"""Attend to the blocks of keys that matter exactly, and to the others by their statistics.

    tokens are cut into blocks of 64       mean key, summed value, and covariance of each
    a block of queries chooses K blocks    by the score of its mean query with their mean keys
    out = [sum over chosen exp(s q.k) v + sum over others exp(s q.mean) (V + s q H)] / same with 1

Nothing is dropped: what is not chosen keeps its share of the softmax. For attention both ways over
many tokens, as in diffusion transformers; early steps and the first layers had better stay dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from ..ir.arguments import with_argument
from ..ir.errors import OptionError
from ..ir.extend import placeholders
from ..ir.facts import Fact
from ..ir.program import MAIN, Program
from ..ir.recognize import Attention
from ..ir.recognize.calls import arguments, op
from ..ir.regions import changed
from ..ir.state import shared, threads
from .base import Evidence, Pass, Plan, Promise, Skip, require_choice, selected
from .shared.cores import sides
from .shared.in_pieces import InPieces, WarmedUp
from .shared.pieces import ORDERS, REFERENCES, SELECTIONS, Pieces
from .shared.plain_core import not_plain, options_of, tokens_of
from .shared.tiles import Tiling

STEP = "step"  # name of the argument that says which step it is, counted from 0


@dataclass(frozen=True, kw_only=True)
class PiecewiseAttention(Pass[Attention, int]):
    """Replace dense attention by exact blocks and an expansion of the rest.

    Attributes:
        density: Fraction of the blocks of keys that each block of queries attends to exactly,
            rounded down to 1 or more blocks.
        kept: Number of these blocks; 0 to go by `density`.
        block_size: Tokens of a block.
        order: What becomes of the other blocks: `hybrid`, an expansion to first order with one
            matrix for all of them; `zeroth`, as if keys of a block were their mean; `first_block`,
            first order with a matrix each, slow and for comparison; `drop`, nothing.
        selection: What blocks are chosen by: the `mean` of their keys, or that and the
            `covariance` of keys and values, for images.
        cov_ref: Whether covariances are measured from `zero` or from the `mean` of all blocks.
        sink: A block that is always exact, 0 for the first or -1 for the last; None for none.
        dense_layers: So many attentions at the beginning stay dense.
        dense_steps: On so many steps of a sampler, from the first, all attentions are dense. The
            program gets an argument `step`, from 0 to `steps` - 1.
        steps: Steps of the sampler; only with `dense_steps`.
        grid: Sizes of the grid of image tokens, as in `[64, 64]`, which is then cut into tiles that
            fill a block; empty to take tokens as they come.
        tile: Sizes of a tile of the grid, a block in all.
        text_prefix: Tokens before the grid, which are always attended to exactly, besides the
            blocks that are chosen.
        min_tokens: Attentions over fewer tokens stay dense.
        dense_above: Attentions that would attend to more than this fraction of blocks exactly stay
            dense, which is faster then.
        include: Glob patterns of attentions to replace.
        exclude: Glob patterns of attentions to leave alone.

    Raises:
        OptionError: An option is out of range, or two do not go together.

    Source: Li et al., PISA, 2026, arXiv:2602.01077.
    Differs: the share of the rest is rescaled whenever the largest score grows, which the released
        kernels leave out; a text prefix is exact, where the released code lets its blocks compete;
        tiles are put back after every attention.
    Exact when: all blocks are kept, or the keys of each block are equal.
    """

    name: ClassVar[str] = "piecewise-attention"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"block_size": 2, "density": 0.5},)
    density: float = 0.125
    kept: int = 0
    block_size: int = 64
    order: str = "hybrid"
    selection: str = "mean"
    cov_ref: str = "zero"
    sink: int | None = None
    dense_layers: int = 0
    dense_steps: int = 0
    steps: int = 0
    grid: tuple[int, ...] = ()
    tile: tuple[int, ...] = (8, 8)
    text_prefix: int = 0
    min_tokens: int = 0
    dense_above: float = 0.6
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "order", self.order, ORDERS)
        require_choice(self.name, "selection", self.selection, SELECTIONS)
        require_choice(self.name, "cov_ref", self.cov_ref, REFERENCES)
        require_choice(self.name, "sink", self.sink, (None, 0, -1))
        if not 0 < self.density <= 1 or not 0 < self.dense_above <= 1:
            raise OptionError(
                f"{self.name}: density={self.density} and dense_above={self.dense_above} are no"
                " fractions of blocks.",
                remedy="use numbers above 0 and at most 1.",
            )
        counts = ("kept", "dense_layers", "dense_steps", "steps", "text_prefix", "min_tokens")
        negative = [name for name in counts if getattr(self, name) < 0]
        if negative or self.block_size < 1:
            name = (*negative, "block_size")[0]
            raise OptionError(
                f"{self.name}: {name}={getattr(self, name)} counts nothing.",
                remedy="use 0 or more, and blocks of 1 or more tokens.",
            )
        if self.dense_steps > self.steps:
            raise OptionError(
                f"{self.name}: dense_steps={self.dense_steps} of steps={self.steps}.",
                remedy="say how many steps the sampler takes in all: steps=50.",
            )
        self._check_grid()

    def _check_grid(self) -> None:
        if not self.grid:
            return
        fits = len(self.grid) == len(self.tile) and min(self.tile) > 0
        fits = fits and math.prod(self.tile) == self.block_size
        fits = fits and all(n % part == 0 for n, part in zip(self.grid, self.tile, strict=True))
        if not fits or self.text_prefix % self.block_size:
            raise OptionError(
                f"{self.name}: tile={list(self.tile)} does not cut grid={list(self.grid)} behind"
                f" {self.text_prefix} tokens into blocks of {self.block_size}.",
                remedy="use tiles of block_size tokens that divide the grid, and a text_prefix of"
                " whole blocks.",
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def prepared(self, program: Program) -> Program:
        """Let the blocks that change know the step."""
        if not self.dense_steps:
            return program
        labels = self.plan(program).decisions
        found = [region for region in self.regions(program) if region.label in labels]
        blocks = dict.fromkeys(region.instance for region in found if region.instance)
        return shared(with_argument(program, STEP), STEP, blocks) if found else program

    def regions(self, program: Program) -> Iterator[Attention]:
        """Yield attentions; where one is a single op that alone, with the step if it is known."""
        for attention in super().regions(program):
            yield _core_of(attention, with_step=self.dense_steps > 0)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[int]:
        """Decide for every attention; the first ones stay dense."""
        able = super().plan(program)
        first = [region.label for region in self.regions(program)][: self.dense_layers]
        stay = dict.fromkeys(first, "is one of the first, which stay dense")
        decisions = {n: kept for n, kept in able.decisions.items() if n not in stay}
        return Plan(decisions, {**stay, **able.skips})

    def decide(self, attention: Attention) -> int | Skip:
        if not selected(attention.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=attention)
        reason = cannot_cut(attention)
        if reason:
            return Skip(reason, at=attention)
        tokens = tokens_of(attention)
        if tokens < max(2 * self.block_size, self.min_tokens):
            least = max(2 * self.block_size, self.min_tokens)
            return Skip(f"has {tokens} tokens, fewer than {least}", at=attention)
        if self.grid and self.text_prefix + math.prod(self.grid) != tokens:
            grid = "x".join(map(str, self.grid))
            reason = f"has {tokens} tokens, which are no grid of {grid} behind {self.text_prefix}"
            return Skip(reason, at=attention)
        count, kept = self.blocks(tokens)
        if kept > self.dense_above * count:
            return Skip(f"would attend to {kept} of {count} blocks: dense is faster", at=attention)
        return kept

    def blocks(self, tokens: int) -> tuple[int, int]:
        """Return how many blocks some tokens are, and how many of them are attended to exactly."""
        count = -(-tokens // self.block_size)
        chosen = self.kept or max(1, math.floor(self.density * count + 1e-9))
        return count, min(count, chosen + self._first())

    def replace(self, attention: Attention, kept: int) -> nn.Module:
        head_dim = sides(attention)[0].meta["val"].shape[-1]
        pieces = Pieces(
            block_size=self.block_size,
            kept=kept,
            order=self.order,
            selection=self.selection,
            cov_ref=self.cov_ref,
            first=max(self._first(), int(self.sink == 0)),
            last=self.sink == -1,
            scale=options_of(attention).get("scale") or 1 / math.sqrt(head_dim),
        )
        grid = Tiling(self.text_prefix, self.grid, self.tile) if self.grid else Tiling()
        module = InPieces(pieces, grid)
        if not self.dense_steps:
            return module
        return WarmedUp(module, options_of(attention), self.dense_steps, self.steps)

    def _first(self) -> int:
        """Return how many blocks the text takes."""
        return -(-self.text_prefix // self.block_size)


def cannot_cut(attention: Attention) -> str | None:
    """Say why blocks of keys cannot stand for all of them."""
    reason = not_plain(attention)
    if reason:
        return reason
    if arguments(attention.core).get("dropout_p"):
        return "drops attention at random"
    whole = {MAIN, *(instance.block for instance in attention.program.instances.values())}
    return None if attention.graph in whole else "is computed on some calls only"


def _core_of(attention: Attention, *, with_step: bool) -> Attention:
    """Return an attention as the one op in its middle; one that is spelled out as it is."""
    if op(attention.core) != "scaled_dot_product_attention":
        return attention
    step = _step_of(attention) if with_step else ()
    core = (attention.core,)
    return changed(attention, nodes=core, inputs=(*sides(attention), *step), outputs=core)


def _step_of(attention: Attention) -> tuple[fx.Node, ...]:
    """Return the step as the graph of an attention has it, if it has it yet."""
    if attention.instance is None:
        places = [node for node in placeholders(attention.program.main) if node.name == STEP]
        return tuple(places)
    thread = threads(attention.program, attention.instance).get(STEP)
    return (thread.current,) if thread else ()
