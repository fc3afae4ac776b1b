"""Let blocks share the layer that makes their shifts, scales and gates of the condition.

    parts = W_i @ silu(c) + b_i        ->        parts = W @ silu(c) + b + table_i

One layer for all blocks, and a stored offset for each (adaLN-single). W is the mean of what it
replaces; a table begins at the mean difference on the calibration, which no other constant beats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Layer, Place
from ..ir.recognize.modulation import Modulation
from ..ir.region_module import Call, RegionModule
from ..ir.taps import tapped
from .base import (
    Calibration,
    Evidence,
    Pass,
    Plan,
    Promise,
    Skip,
    count_of,
    require_choice,
    selected,
)
from .shared.influence import mean_over
from .shared.losses import balanced_features, output_mse
from .shared.moe_stages import features
from .shared.recovery import Stage
from .shared.tying import mean, once

Source = tuple[str, int]


@dataclass(frozen=True)
class Shared:
    """What the layers of a block's modulation become.

    Attributes:
        sources: For each layer those it starts from the mean of: label of the modulation, and which
            of its layers.
        inputs: For each layer the mean of what it reads, [dim]; none without calibration.
    """

    sources: list[list[Source]]
    inputs: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class ShareModulation(Pass[Modulation, Shared]):
    """Share one modulation layer among blocks, with a table of offsets for each.

    Attributes:
        across: Which layers become one: those of the same `kind`, the image's of all joint blocks,
            the text's, the single blocks'; or all of the `model`, of which a layer with fewer
            results reads the first ones.
        epochs: Times the calibration is gone through when layers and tables are trained back.
        rate: Largest learning rate of that training.
        include: Glob patterns of modulations that may be shared.
        exclude: Glob patterns of modulations that stay.

    Raises:
        OptionError: An option is out of range.

    Source: Chen et al., PixArt-alpha, 2023, arXiv:2310.00426, section 2.3 (adaLN-single).
    Differs: converts a trained model, which the paper does for blocks of equal tables at one time
        step: the layer is the mean of the blocks' own, the tables are fitted. Each block calls the
        shared layer; engines compute equal calls once.
    Exact when: the layers that become one have equal weights, bit by bit; and at a constant
        condition, which tables make up for.
    """

    name: ClassVar[str] = "share-modulation"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must average"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"across": "model"})
    across: str = "kind"
    epochs: int = 1
    rate: float = 1e-3
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "across", self.across, ("kind", "model"))
        if self.epochs < 1 or self.rate <= 0:
            raise OptionError(
                f"{self.name}: epochs={self.epochs}, rate={self.rate}.",
                remedy="use one epoch or more, and a positive rate.",
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        found = [m for m in self.regions(program) if not isinstance(self.decide(m), Skip)]
        layers = [layer for modulation in found for layer in modulation.layers]
        if not layers or any(layer.weight.is_meta for layer in layers):
            return None
        taps = tapped(program, [Place(layer.instance, layer.inputs[0]) for layer in layers])

        def means(inputs: Sequence[Tensor]) -> Tensor:
            return torch.cat([x.double().flatten(0, -2).mean(dim=0) for x in taps(*inputs)])

        sizes = [layer.in_features for layer in layers]
        known = iter(mean_over(calibration, means).split(sizes))
        regions = {m.label: [next(known).tolist() for _ in m.layers] for m in found}
        return Evidence(count_of(calibration), regions)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Shared]:
        found = {modulation.label: modulation for modulation in self.regions(program)}
        decided = {label: self.decide(modulation) for label, modulation in found.items()}
        kinds: dict[object, list[Source]] = {}
        for label, decision in decided.items():
            for index in range(0 if isinstance(decision, Skip) else len(found[label].layers)):
                kinds.setdefault(self._kind(found[label], index), []).append((label, index))
        decisions: dict[str, Shared] = {}
        skips = {label: d.reason for label, d in decided.items() if isinstance(d, Skip)}
        for label, decision in decided.items():
            if isinstance(decision, Skip):
                continue
            modulation = found[label]
            own = [kinds[self._kind(modulation, i)] for i in range(len(modulation.layers))]
            if all({source for source, _ in sources} == {label} for sources in own):
                skips[label] = "has no other block to share with"
            else:
                inputs = evidence.regions[label] if evidence else []
                decisions[label] = replace(decision, sources=own, inputs=inputs)
        return Plan(decisions, skips)

    def decide(self, region: Modulation) -> Shared | Skip:
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        if region.form != "per-block" or region.tables or any(map(_is_tied, region.layers)):
            return Skip("is shared already", at=region)
        if any(not layer.is_dense or layer.is_fused for layer in region.layers):
            return Skip("has a layer that computes something else as well", at=region)
        return Shared([], [])

    def replace(self, region: Modulation, decision: Shared) -> nn.Module:
        calls = {}
        layers = nn.ModuleList()
        for index, (layer, sources) in enumerate(zip(region.layers, decision.sources, strict=True)):
            known = decision.inputs[index] if decision.inputs else None
            layers.append(self._layer(region, layer, sources, known))
            calls[layer.node] = Call(layers[index], (layer.inputs[0],))
        module = RegionModule(region, calls=calls)
        module.shared = layers
        return module

    def recovery(self, old: Program, new: Program, plan: Plan[Shared]) -> Sequence[Stage]:
        weights = [
            modulation.tensor_name(source)
            for modulation in new.regions(Modulation)
            if modulation.tables
            for node in modulation.nodes
            for source in node.all_input_nodes
            if source.op == "get_attr"
        ]
        if not weights:
            return []
        loss = balanced_features(output_mse(old, new), features(new), features(old))
        return [
            Stage(name="modulation", weights=dict.fromkeys(weights), loss=loss,
                  epochs=self.epochs, rate=self.rate)
        ]  # fmt: skip

    def statistics(self, plan: Plan[Shared]) -> Mapping[str, int]:
        every = [sources for decision in plan.decisions.values() for sources in decision.sources]
        return {"layers": len(every), "shared layers": len({tuple(group) for group in every})}

    def _kind(self, modulation: Modulation, index: int) -> object:
        """Return what tells a layer apart from those it does not share with."""
        layer = modulation.layers[index]
        if self.across == "model":
            return layer.in_features
        roles = tuple((c.role, c.sublayer, c.stream, c.layer) for c in modulation.chunks)
        return roles, index, layer.weight.shape

    def _layer(
        self, region: Modulation, layer: Layer, sources: Sequence[Source], known: Any
    ) -> OffsetLayer:
        program = region.program
        weight, bias = once(
            program, (self.name, *map(tuple, sources)), lambda: _joined(program, sources)
        )
        rows = len(layer.weight)
        table = _bias(layer).double() - bias[:rows].double()
        if known is not None:
            x = torch.tensor(known, dtype=torch.float64, device=weight.device)
            table = table + (layer.weight.double() - weight[:rows].double()) @ x
        return OffsetLayer(weight, bias, table.to(weight.dtype))


class OffsetLayer(nn.Module):
    """A layer that others share, its first results shifted by a table."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, table: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch rows"]:
        y = F.linear(x, self.weight, self.bias)
        return (y if y.shape[-1] == len(self.table) else y[..., : len(self.table)]) + self.table


def mean_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean of tensors, row by row, of those that have the row."""
    ends = sorted({len(tensor) for tensor in tensors})
    parts = [
        _mean([tensor[start:end] for tensor in tensors if len(tensor) >= end])
        for start, end in pairwise([0, *ends])
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if tensors[0].is_meta else mean(tensors)


def _joined(program: Program, sources: Sequence[Source]) -> tuple[nn.Parameter, nn.Parameter]:
    """Return weight and bias of the layer that stands for some."""
    known = {modulation.label: modulation for modulation in program.regions(Modulation)}
    layers = [known[label].layers[index] for label, index in sources]
    weight, bias = (
        mean_rows([layer.weight for layer in layers]),
        mean_rows(list(map(_bias, layers))),
    )
    return nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)


def _bias(layer: Layer) -> Tensor:
    weight = layer.weight
    return weight.new_zeros(len(weight)) if layer.bias is None else layer.bias


def _is_tied(layer: Layer) -> bool:
    return layer.weight_node is not None and layer.is_shared(layer.weight_node)
