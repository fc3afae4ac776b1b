"""Let channels attend to channels over the whole sequence, and drop what is not alike.

    y = softmax(q @ k.T) @ v                           tokens by tokens
->  y = v @ relu(t * normalise(q).T @ normalise(k)).T  channels by channels, linear in tokens

Products below zero weigh nothing and rows are not normalised, so channels that are unlike leave
each other alone. No token is looked at by another one: they meet in the products of channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Attention
from .base import Calibration, Evidence, Pass, Plan, Promise, Skip, selected
from .shared.channels import ChannelCore, nearest_temperature
from .shared.cores import counts, fit_in_order, heads_of, no_core, sides, trained_back, with_core
from .shared.recovery import Stage


@dataclass(frozen=True)
class Sparse:
    """How an attention becomes one of channels.

    Attributes:
        temperature: Factor of the scores at first, per head.
        tile: Tokens of a run; None for the whole sequence.
    """

    temperature: list[float]
    tile: int | None = None


@dataclass(frozen=True, kw_only=True)
class SparseGlobalAttention(Pass[Attention, Sparse]):
    """Replace softmax attention of tokens by rectified attention of channels.

    Attributes:
        tile: Tokens that channels are compared over, where the sequence has more: the length the
            model was trained back at. None for the whole sequence, whatever its length.
        dense_below: Attentions over fewer keys are left alone; None for those that cost less as
            they are, of fewer keys than a head has channels.
        epochs: Times the calibration is gone through when attentions are trained back.
        rate: Largest learning rate of that training.
        include: Glob patterns of attentions to replace.
        exclude: Glob patterns of attentions to leave alone.

    Raises:
        OptionError: An option is out of range.

    Source: Li et al., DLGSANet, 2023, arXiv:2301.02031 (SparseGSA).
    Differs: replaces attentions of a trained model; temperatures begin where they come nearest to
        softmax attention on the first set of calibration inputs. Runs are of tokens in a row,
        tiles in the paper are squares of an image.
    Exact when: never; tokens no longer attend to tokens. What it loses, training is to bring back.
    """

    name: ClassVar[str] = "sparse-global-attention"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"dense_below": 0},)
    tile: int | None = None
    dense_below: int | None = None
    epochs: int = 1
    rate: float = 1e-3
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.tile is not None and self.tile < 1) or self.epochs < 1 or self.rate <= 0:
            raise OptionError(
                f"{self.name}: tile={self.tile}, epochs={self.epochs}, rate={self.rate}.",
                remedy="use one token and one epoch or more, and a positive rate.",
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        found = [a for a in self.regions(program) if isinstance(self.decide(a), Sparse)]
        inputs = next(iter(calibration), None)
        if not found or inputs is None or any(t.is_meta for t in program.tensors.values()):
            return None
        known: dict[str, Sparse] = {}

        def learn(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> nn.Module:
            target = F.scaled_dot_product_attention(q, heads_of(q, k), heads_of(q, v))
            best = nearest_temperature(q, heads_of(q, k), heads_of(q, v), target)
            known[attention.label] = Sparse(best.tolist(), self.tile)
            return self.replace(attention, known[attention.label])

        fit_in_order(program, found, inputs, learn)
        return Evidence(1, known)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Sparse]:
        plan = super().plan(program)
        known = evidence.regions if evidence else {}
        return Plan({n: known.get(n, sparse) for n, sparse in plan.decisions.items()}, plan.skips)

    def decide(self, attention: Attention) -> Sparse | Skip:
        reason = self._obstacle(attention)
        if reason:
            return Skip(reason, at=attention)
        heads = int(sides(attention)[0].meta["val"].shape[1])
        return Sparse([1.0] * heads, self.tile)

    def _obstacle(self, attention: Attention) -> str | None:
        """Say why an attention keeps its softmax, or None."""
        if not selected(attention.label, self.include, self.exclude):
            return "is excluded by pattern"
        reason = no_core(attention)
        if reason:
            return reason
        queries, keys = counts(attention)
        if queries != keys or attention.source not in ("self", "joint"):
            return "attends to another sequence, whose channels are others"
        if attention.head_dim is None or attention.head_dim != attention.value_dim:
            return "has values of another width than queries"
        least = attention.head_dim if self.dense_below is None else self.dense_below
        if keys < least:
            return f"looks at {keys} keys, below {least} attention stays dense"
        seq = sides(attention)[0].meta["val"].shape[2]
        if self.tile is not None and not isinstance(seq, int):
            return "has a number of tokens that may change, which is not cut into runs"
        return None

    def replace(self, attention: Attention, sparse: Sparse) -> nn.Module:
        query = sides(attention)[0].meta["val"]
        device = next(iter(attention.program.tensors.values())).device
        temperature = torch.tensor(sparse.temperature, dtype=query.dtype, device=device)
        seq = query.shape[2]
        core = ChannelCore(temperature, sparse.tile, seq if isinstance(seq, int) else None)
        return with_core(attention, "channels", core)

    def recovery(self, old: Program, new: Program, plan: Plan[Sparse]) -> Sequence[Stage]:
        replaced = [a for a in self.regions(old) if a.label in plan.decisions]
        own = ("channels.temperature",)
        return trained_back(
            old, new, replaced, own, by=self.name, epochs=self.epochs, rate=self.rate
        )
