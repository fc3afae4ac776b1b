"""Look rows up in tables instead of multiplying by weights.

    y = x @ W.T + b      ->      y = sum over chunks k of  score_k * table[k, code_k] + b

The signs of a chunk of x address a row of its table, its size says how much the row counts.
Queries, keys and values are looked up by one hash, a feed-forward network becomes two lookups with
a norm between them, and the layer behind an attention goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.ops.hashing import SCORES
from ..ir.program import Program
from ..ir.recognize import FeedForward
from ..ir.recognize.readers import INPUTS, OTHER, OUTPUT, Readers
from .base import Calibration, Evidence, Pass, Plan, Promise, Skip, require_choice, selected
from .shared.hashable import cannot_hash, cannot_remove
from .shared.hashed import (
    NETWORKS,
    TABLE_STD,
    Apart,
    HashedLayer,
    hashed_network,
    random_layer,
    side_by_side,
    small_std,
)
from .shared.losses import output_mse
from .shared.recovery import Stage
from .shared.students import blocks_with, taught
from .shared.tables import FITS, RowSums, dense_layer, row_sums

NETWORK = "feed_forward"
PARTS = (INPUTS, OUTPUT, NETWORK, OTHER)
MOST_BITS = 16
Becomes = Literal["tables", "network", "nothing"]


@dataclass(frozen=True, kw_only=True)
class HashLinear(Pass[Readers | FeedForward, Becomes]):
    """Replace linear layers by tables that are addressed by signs.

    Layers that read what no norm has centred suit it badly, those behind an activation not at all.

    Attributes:
        tau: Elements of a chunk, and bits that address a table; must divide the width a layer
            reads. 1 to 16.
        parts: Which layers: those before an `attention`, the `output` behind it, the
            `feed_forward` networks, any `other`.
        score: How much a row counts: `l1_softmax`, or `softmax` without the size of the chunk.
        share_qkv_hash: Layers that read one value take their rows from one table; False gives each
            its own. The numbers are the same.
        ffn_mode: What a network becomes: `extra_bit`, whose second tables have `extra_bits` more;
            `extra_table`, which has twice as many there; `single`, one layer.
        extra_bits: See `ffn_mode`.
        remove_out_proj: Leave out the layer behind an attention that is hashed.
        init: What tables of single layers begin with: `random` numbers; or what their rows should
            answer on the calibration, by `conditional_mean` or `least_squares`. Networks always
            begin at random.
        include: Glob patterns of module paths to hash.
        exclude: Glob patterns of module paths to leave alone.
        epochs: How often training sees the calibration.
        rate: Learning rate.

    Raises:
        OptionError: An option is out of range, a weight to begin with is not finite, or there is
            no calibration to fit rows to.

    Source: Ding et al., MemoryFormer, 2024, arXiv:2411.12992.
    Differs: converts trained models, block by block with the model before as teacher; the paper
        trains from scratch. Hashing is part of the lookup, so shared tables are wider ones.
    Exact when: all elements of what layers read are of one size, with one of the calibrated
        beginnings, and only `attention`, `output` or `other` layers are hashed, none removed.
    """

    name: ClassVar[str] = "hash-linear"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must read into tables"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tau": 2},)
    tau: int = 8
    parts: tuple[str, ...] = (INPUTS, NETWORK)
    score: str = "l1_softmax"
    share_qkv_hash: bool = True
    ffn_mode: str = "extra_bit"
    extra_bits: int = 2
    remove_out_proj: bool = True
    init: str = "random"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    epochs: int = 1
    rate: float = 3e-3

    def __post_init__(self) -> None:
        require_choice(self.name, "score", self.score, SCORES)
        require_choice(self.name, "ffn_mode", self.ffn_mode, NETWORKS)
        require_choice(self.name, "init", self.init, ("random", *FITS))
        for part in self.parts:
            require_choice(self.name, "parts", part, PARTS)
        most = MOST_BITS - self.tau
        self._refuse("tau", self.tau, 1 <= self.tau <= MOST_BITS, f"1 to {MOST_BITS}")
        self._refuse("extra_bits", self.extra_bits, 0 <= self.extra_bits <= most, f"0 to {most}")
        self._refuse("epochs", self.epochs, self.epochs >= 1, "1 or more")
        self._refuse("rate", self.rate, 0 < self.rate < math.inf, "a positive number")

    def _refuse(self, option: str, value: float, fits: bool, words: str) -> None:
        if not fits:
            raise OptionError(f"{self.name}: {option}={value} is out of range; use {words}.")

    def ends(self) -> frozenset[Fact]:
        everywhere = NETWORK in self.parts and self.include == ("*",) and not self.exclude
        networks = {Fact.PLAIN_FEED_FORWARDS} if everywhere else set()
        return frozenset({Fact.CALIBRATED} | networks)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Becomes]:
        plan = super().plan(program)
        regions = [r for r in self.regions(program) if r.label in plan.decisions]
        tables = [r for r in regions if plan.decisions[r.label] == "tables"]
        hashed = {(region.instance, node) for region in tables for node in region.nodes}
        kept = [
            region.label
            for region in regions
            if plan.decisions[region.label] == "nothing"
            and isinstance(region, Readers)
            and not hashed.issuperset((region.instance, node) for node in region.before)
        ]
        decisions = {n: d for n, d in plan.decisions.items() if n not in kept}
        reason = "stays: not all that makes queries, keys and values is hashed"
        return Plan(decisions, {**plan.skips, **dict.fromkeys(kept, reason)})

    def decide(self, region: Readers | FeedForward) -> Becomes | Skip:
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        if isinstance(region, Readers) and self._leaves_out(region):
            reason = cannot_remove(region)
            return Skip(reason, at=region) if reason else "nothing"
        part = NETWORK if isinstance(region, FeedForward) else region.role
        if part not in self.parts:
            return Skip(f"is of a part that stays: {part}", at=region)
        reason = cannot_hash(region, self.tau)
        if reason:
            return Skip(reason, at=region)
        return "network" if part == NETWORK else "tables"

    def _leaves_out(self, region: Readers) -> bool:
        return region.role == OUTPUT and self.remove_out_proj and INPUTS in self.parts

    def replace(self, region: Readers | FeedForward, decision: Becomes) -> nn.Module:
        if isinstance(region, FeedForward):
            return hashed_network(
                region.dim, region.down.shape[0], self.tau, self.extra_bits,
                mode=self.ffn_mode, score=self.score, like=region.up,
            )  # fmt: skip
        if decision == "nothing":
            return nn.Identity()
        layers = [
            random_layer(
                layer.weight.shape[1], len(layer.weight), self.tau, self.score, layer.weight,
                small_std(layer.weight.shape[1]) if region.role == INPUTS else TABLE_STD,
            )
            for layer in region.linears
        ]  # fmt: skip
        return self._together(layers)

    def calibrate(
        self, old: Program, new: Program, plan: Plan[Becomes], calibration: Calibration
    ) -> Mapping[str, Tensor]:
        regions = [
            region
            for region in self.regions(old)
            if isinstance(region, Readers) and plan.decisions.get(region.label) == "tables"
        ]
        if self.init == "random" or not regions:
            return {}
        sums = row_sums(old, regions, calibration, self.tau, self.score, self.init)
        found = zip(regions, sums, strict=True)
        return {n: t for region, one in found for n, t in self._named(region, one).items()}

    def _named(self, region: Readers, sums: RowSums) -> Mapping[str, Tensor]:
        """Return tables and biases of what stands for a region, by name."""
        layers = [dense_layer(layer, sums, self.score) for layer in region.linears]
        named = self._together(layers).named_parameters()
        return {f"{region.label}.{name}": parameter.data for name, parameter in named}

    def _together(self, layers: Sequence[HashedLayer]) -> nn.Module:
        return side_by_side(layers) if self.share_qkv_hash or len(layers) == 1 else Apart(layers)

    def recovery(self, old: Program, new: Program, plan: Plan[Becomes]) -> Sequence[Stage]:
        names = [name for name in new.tensors if name in new.parameters - old.parameters]
        if not names:
            return ()
        regions = [region for region in self.regions(old) if region.label in plan.decisions]
        runs = [(label, label, label) for label in blocks_with(old, regions)]
        loss, feeds = taught(old, new, runs, F.mse_loss)
        return [
            Stage(
                name="tables",
                weights=dict.fromkeys(names),
                loss=loss if loss.student else output_mse(old, new),
                feeds=feeds,
                epochs=self.epochs,
                rate=self.rate,
            )
        ]
