"""Let tokens attend to each other by binary codes, in time linear in their number.

    y = softmax(q @ k.T) @ v      ->      y_i = sum_j (h(q_i) . h(k_j) + c) v_j / its row sum

Codes are learned per head from the layer's own attention on calibration inputs, so that similar
tokens share bits. Products with codes are additions; keys and values meet in one state matrix of
[bits, value_dim] per head, and no matrix of tokens by tokens is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Attention
from .base import Calibration, Evidence, Pass, Plan, Promise, Skip, require_choice, selected
from .shared.cores import counts, fit_in_order, no_core, sides, trained_back, with_core
from .shared.hash_fit import HashFit
from .shared.hashing import Hash, HashedCore
from .shared.recovery import Stage

Numbers = list[list[list[float]]]


@dataclass(frozen=True)
class Codes:
    """The hash functions of an attention, by head; empty before they are learned.

    Attributes:
        anchors: [heads, anchors, head_dim].
        means: [heads, 1, anchors].
        planes: [heads, bits, anchors].
    """

    anchors: Numbers
    means: Numbers
    planes: Numbers


@dataclass(frozen=True, kw_only=True)
class HashedLinearAttention(Pass[Attention, Codes]):
    """Replace softmax attention by attention over learned binary codes.

    Attributes:
        bits: Bits of a code.
        anchors: Tokens of the calibration that others are compared with, per head.
        neighbours: Keys that count as similar to a query when codes are learned, and as many as
            dissimilar; attentions over fewer than twice as many keys are left alone.
        start: Where codes start: at `random`, or `eigen`, where one bit explains most.
        steps: Gradient steps that each bit is trained for; 0 leaves it where it starts.
        fit_rate: Learning rate of these steps.
        offset: `kernel`, whose rows add up to one; or `released`, what the released code computes,
            for weights that were trained with it.
        share: One projection for queries and keys: of the `query`, of the `key`, or their `mean`;
            `none` keeps both.
        dense_below: Attentions over fewer keys are left alone.
        seed: Draws anchors and first bits.
        epochs: Times the calibration is gone through when attentions are trained back.
        rate: Largest learning rate of that training.
        include: Glob patterns of attentions to replace.
        exclude: Glob patterns of attentions to leave alone.

    Raises:
        OptionError: An option is out of range, or there is nothing to learn codes from.

    Source: Liu et al., EcoFormer, 2022, arXiv:2209.09004.
    Differs: queries and keys may keep projections of their own; anchors are drawn from the whole
        first set of calibration inputs, not its first sample; zero is hashed to 1, so that a code
        is bits alone.
    Exact when: the values of all keys are equal, as those of one key are, with `offset="kernel"`.
    """

    name: ClassVar[str] = "hashed-linear-attention"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"bits": 4, "anchors": 2, "neighbours": 1, "steps": 2, "dense_below": 0},
    )
    bits: int = 16
    anchors: int = 25
    neighbours: int = 10
    start: str = "random"
    steps: int = 100
    fit_rate: float = 0.5
    offset: str = "kernel"
    share: str = "none"
    dense_below: int = 65
    seed: int = 0
    epochs: int = 1
    rate: float = 5e-5
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "start", self.start, ("random", "eigen"))
        require_choice(self.name, "offset", self.offset, ("kernel", "released"))
        require_choice(self.name, "share", self.share, ("none", "query", "key", "mean"))
        if min(self.bits, self.anchors, self.neighbours, self.epochs) < 1 or self.steps < 0:
            raise OptionError(
                f"{self.name}: bits={self.bits}, anchors={self.anchors},"
                f" neighbours={self.neighbours}, steps={self.steps}, epochs={self.epochs}.",
                remedy="use one or more of each; of steps, none or more.",
            )
        if self.fit_rate <= 0 or self.rate <= 0:
            raise OptionError(
                f"{self.name}: fit_rate={self.fit_rate}, rate={self.rate} are to be positive."
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        found = [a for a in self.regions(program) if not isinstance(self.decide(a), Skip)]
        if not found or any(tensor.is_meta for tensor in program.tensors.values()):
            return None
        fit = HashFit(self.bits, self.anchors, self.neighbours, self.start, self.steps,
                      self.fit_rate, self.seed)  # fmt: skip
        codes: dict[str, Codes] = {}

        def learn(attention: Attention, query: Tensor, key: Tensor, _: Tensor) -> nn.Module:
            query, key = _shared(self.share, query, key)
            function = fit(query, key)
            codes[attention.label] = Codes(*(tensor.tolist() for tensor in function))
            return self.replace(attention, codes[attention.label])

        inputs = next(iter(calibration), None)
        if inputs is None:
            raise OptionError(
                f"{self.name} has no calibration inputs to learn codes from.",
                remedy="give calibration=... a set of inputs; codes are learned from the first.",
            )
        fit_in_order(program, found, inputs, learn)
        return Evidence(1, codes)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Codes]:
        plan = super().plan(program)
        known = evidence.regions if evidence else {}
        return Plan({n: known.get(n, empty) for n, empty in plan.decisions.items()}, plan.skips)

    def decide(self, attention: Attention) -> Codes | Skip:
        reason = self._obstacle(attention)
        return Skip(reason, at=attention) if reason else Codes([], [], [])

    def _obstacle(self, attention: Attention) -> str | None:
        """Say why an attention keeps its softmax, or None."""
        if not selected(attention.label, self.include, self.exclude):
            return "is excluded by pattern"
        reason = no_core(attention)
        if reason:
            return reason
        queries, keys = counts(attention)
        if keys < self.dense_below:
            return f"looks at {keys} keys, below {self.dense_below} attention stays dense"
        if keys < max(2 * self.neighbours, self.anchors):
            return (
                f"looks at {keys} keys: too few for {self.anchors} anchors"
                f" and twice {self.neighbours} neighbours"
            )
        if self.offset == "released" and queries != keys:
            return "has queries without a value of their own"
        return cannot_share(attention) if self.share != "none" else None

    def replace(self, attention: Attention, codes: Codes) -> nn.Module:
        core = HashedCore(self._function(attention, codes), released=self.offset == "released")
        query, key, value = sides(attention)
        one = key if self.share == "key" else query
        values = (query, key, value) if self.share == "none" else (one, one, value)
        weights = mean_projection(attention) if self.share == "mean" else {}
        return with_core(attention, "hash", core, values, weights)

    def recovery(self, old: Program, new: Program, plan: Plan[Codes]) -> Sequence[Stage]:
        replaced = [a for a in self.regions(old) if a.label in plan.decisions]
        return trained_back(old, new, replaced, by=self.name, epochs=self.epochs, rate=self.rate)

    def _function(self, attention: Attention, codes: Codes) -> Hash:
        query = sides(attention)[0].meta["val"]
        device = next(iter(attention.program.tensors.values())).device
        if codes.planes:
            parts = (codes.anchors, codes.means, codes.planes)
            return Hash(*(torch.tensor(part, dtype=query.dtype, device=device) for part in parts))
        heads, width = query.shape[1], query.shape[-1]
        shapes = ((self.anchors, width), (1, self.anchors), (self.bits, self.anchors))
        return Hash(*(torch.zeros(heads, *s, dtype=query.dtype, device=device) for s in shapes))


def cannot_share(attention: Attention) -> str | None:
    """Say why queries and keys cannot come from one projection, or None."""
    query, key = attention.query, attention.key
    if attention.x_q is not attention.x_k:
        return "makes queries and keys of different values"
    if query is None or key is None or not (query.is_dense and key.is_dense):
        return "has no dense projections of queries and keys"
    alike = query.weight.shape == key.weight.shape and (query.bias is None) == (key.bias is None)
    if not alike or attention.qk_norm:
        return "has projections of queries and keys that differ in more than their weights"
    return None


def mean_projection(attention: Attention) -> dict[fx.Node, Tensor]:
    """Return the weights of a query projection that is the mean of query's and key's."""
    query, key = attention.query, attention.key
    assert query is not None
    assert key is not None
    assert query.weight_node is not None
    assert query.rows is not None
    found = {query.weight_node: (query.weight + key.weight) / 2}
    if query.bias_node is not None and query.bias is not None:
        assert key.bias is not None
        found[query.bias_node] = (query.bias + key.bias) / 2
    rows = {}
    for node, mean in found.items():
        whole = attention.tensor(node)
        index = query.rows.take(torch.arange(len(whole), device=whole.device))
        rows[node] = whole.index_copy(0, index, mean)
    return rows


def _shared(share: str, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys as one projection would make them."""
    if share == "none":
        return query, key
    one = {"query": query, "key": key}.get(share)
    one = (query + key) / 2 if one is None else one
    return one, one
