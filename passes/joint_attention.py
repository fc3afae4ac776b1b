"""Attend directly within chunks, and to the whole sequence linearly.

    y = softmax(q @ k.T) @ v      ->      y = relu(q1 @ k1.T / chunk)^2 @ v + q2 @ (k2.T @ v) / seq

q1, q2, k1 and k2 are the queries and keys there were, each scaled and shifted feature by feature.
No matrix of all tokens by all tokens is made, so the cost is linear in their number.
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
from .shared.cores import counts, fit_in_order, heads_of, no_core, sides, trained_back, with_core
from .shared.joint import JointCore, Sides, factors
from .shared.recovery import Stage


@dataclass(frozen=True)
class Joint:
    """How an attention is split in two.

    Attributes:
        chunk: Tokens of a chunk.
        causal: Whether tokens see none that come later.
        local: Factor the local part starts with, per head.
        linear: Factor the linear part starts with, per head.
    """

    chunk: int
    causal: bool
    local: list[float]
    linear: list[float]


@dataclass(frozen=True, kw_only=True)
class JointAttention(Pass[Attention, Joint]):
    """Replace softmax attention by local attention without softmax and linear attention.

    Attributes:
        chunk: Tokens that attend to each other directly, 1 or more.
        dense_below: Attentions over fewer keys are left alone; None for those where the two parts
            cost more than the products of all queries and keys.
        epochs: Times the calibration is gone through when attentions are trained back.
        rate: Largest learning rate of that training.
        include: Glob patterns of attentions to replace.
        exclude: Glob patterns of attentions to leave alone.

    Raises:
        OptionError: An option is out of range.

    Source: Zhao and Ma, MossFormer, 2023, arXiv:2302.11824.
    Differs: replaces attentions of a trained model, with many heads and without the gates of the
        paper's unit; per head, both parts begin with the factors that come nearest to softmax
        attention on the first set of calibration inputs.
    Exact when: never; squared scores are no softmax. What it loses, training is to bring back.
    """

    name: ClassVar[str] = "joint-attention"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"chunk": 2, "dense_below": 0},)
    chunk: int = 256
    dense_below: int | None = None
    epochs: int = 1
    rate: float = 1e-3
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.chunk, self.epochs) < 1 or self.rate <= 0:
            raise OptionError(
                f"{self.name}: chunk={self.chunk}, epochs={self.epochs}, rate={self.rate}.",
                remedy="use one token and one epoch or more, and a positive rate.",
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        found = {a.label: a for a in self.regions(program)}
        decided = {n: d for n, a in found.items() if isinstance(d := self.decide(a), Joint)}
        inputs = next(iter(calibration), None)
        if not decided or inputs is None or any(t.is_meta for t in program.tensors.values()):
            return None
        known: dict[str, Joint] = {}

        def learn(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> nn.Module:
            joint = decided[attention.label]
            known[attention.label] = fitted(joint, q, heads_of(q, k), heads_of(q, v))
            return self.replace(attention, known[attention.label])

        fit_in_order(program, [found[label] for label in decided], inputs, learn)
        return Evidence(1, known)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Joint]:
        plan = super().plan(program)
        known = evidence.regions if evidence else {}
        return Plan({n: known.get(n, joint) for n, joint in plan.decisions.items()}, plan.skips)

    def decide(self, attention: Attention) -> Joint | Skip:
        reason = self._obstacle(attention)
        if reason:
            return Skip(reason, at=attention)
        query = sides(attention)[0].meta["val"]
        seq, heads = query.shape[2], query.shape[1]
        chunk = min(self.chunk, seq) if isinstance(seq, int) else self.chunk
        ones = [1.0] * heads
        return Joint(chunk, attention.mask == "causal", ones, ones)

    def _obstacle(self, attention: Attention) -> str | None:
        """Say why an attention keeps its softmax, or None."""
        if not selected(attention.label, self.include, self.exclude):
            return "is excluded by pattern"
        reason = no_core(attention, ("none", "causal"))
        if reason:
            return reason
        queries, keys = counts(attention)
        if attention.source not in ("self", "joint") or queries != keys:
            return "attends to another sequence, whose chunks are others"
        least = self.dense_below
        if least is None:
            s, e = (int(side.meta["val"].shape[-1]) for side in sides(attention)[1:])
            least = self.chunk + 2 * s * e // (s + e)
        if keys < least:
            return f"looks at {keys} keys, below {least} attention stays dense"
        return None

    def replace(self, attention: Attention, joint: Joint) -> nn.Module:
        query = sides(attention)[0].meta["val"]
        device = next(iter(attention.program.tensors.values())).device
        local, linear = (
            torch.tensor(found, dtype=query.dtype, device=device)
            for found in (joint.local, joint.linear)
        )
        core = JointCore(local, linear, query.shape[-1], joint.chunk, causal=joint.causal)
        return with_core(attention, "joint", core)

    def recovery(self, old: Program, new: Program, plan: Plan[Joint]) -> Sequence[Stage]:
        replaced = [a for a in self.regions(old) if a.label in plan.decisions]
        own = ("joint.gain", "joint.shift")
        return trained_back(
            old, new, replaced, own, by=self.name, epochs=self.epochs, rate=self.rate
        )


def fitted(joint: Joint, q: Tensor, k: Tensor, v: Tensor) -> Joint:
    """Return the split whose parts start nearest to softmax attention on some values."""
    target = F.scaled_dot_product_attention(q, k, v, is_causal=joint.causal)
    found = factors(Sides(q, q, k, k), v, target, joint.chunk, causal=joint.causal)
    local, linear = found.T.tolist()
    return Joint(joint.chunk, joint.causal, local, linear)
