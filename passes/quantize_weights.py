"""Store weights as low-bit integers with a scale per group.

    codes = round(w / s)      s = max|w| / 127  or  / 7, per output channel and group of inputs

Weight-only, the layer multiplies by the dequantized weight. With `activations="int8"` it also
quantizes its input, one scale per token, and multiplies integers. Matrices of experts are codes
that become floats expert by expert; routers stay as they are.

    rtn     round(w / s)                              gptq    errors make up for each other
    awq     x / t, round(t * w / s), t large where inputs are
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.ops import int8_linear, packing
from ..ir.program import Program
from ..ir.recognize import Embedding, Linear, StackedWeight
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
from .shared.awq import folds_into
from .shared.bits import (
    FORMS,
    Measured,
    coded,
    needs_sensitivity,
    sensitivities,
    within_budget,
)
from .shared.calibrated import awq_weights, gptq_codes, together
from .shared.coded import (
    Int8Linear,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    experts_bound,
    int8_bound,
    weight_only_bound,
)
from .shared.codes import Codes, quantize, quantize_experts, quantize_rows
from .shared.moments import input_moments

Weights = Linear | Embedding | StackedWeight


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass[Weights, Codes]):
    """Quantize the weights of linear layers and experts, and embedding tables when asked.

    Attributes:
        bits: 8 or 4 bits per weight. Embedding tables always take 8.
        group_size: Input features that share a scale, 1 or more; None for all of them. The last
            group of a layer may be shorter.
        symmetric: Codes around zero; False stores a zero point per group.
        activations: None leaves activations in floating point; `int8` quantizes them per token at
            run time and multiplies integers (needs bits=8, symmetric, group_size=None). Experts
            stay weight-only.
        method: How codes are found: `rtn`, each the nearest; `gptq` and `awq`, those of linear
            layers by what these read on the calibration.
        damping: With gptq, what is added to the diagonal of second moments, relative to its mean.
        act_order: With gptq, take the largest inputs first.
        budget_bits: Bits per weight, scales and zero points included, that all layers and experts
            take together. Each then has 4 bits in some group size, 8, or stays as it is, by how
            much it changes the outputs on the first calibration sets; `bits` and `group_size` are
            left out.
        embeddings: Also quantize embedding tables, to 8 bits with one scale per row.
        include: Glob patterns of module paths to quantize.
        exclude: Glob patterns of module paths to leave alone.

    Raises:
        OptionError: An option is out of range or does not go with the others, or there is no
            calibration to go by.

    Source: Jacob et al., 2018, arXiv:1712.05877 (integer arithmetic); per-token scales as in
        ZeroQuant, Yao et al., 2022, arXiv:2206.01861; GPTQ, Frantar et al., 2023,
        arXiv:2210.17323; AWQ, Lin et al., 2024, arXiv:2306.00978.
    Differs: with `activations="int8"` weights use 7 of 8 bits, which no x86 instruction set can
        overflow. Inputs are gathered once, of the model as it was, and a layer keeps the nearest
        codes where GPTQ finds no better ones.
    Exact when: every weight is a multiple of its scale within the code range (weight-only).
    """

    name: ClassVar[str] = "quantize-weights"
    promise: ClassVar[Promise] = Promise.BOUNDED
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"bits": 4, "group_size": 8, "embeddings": True},
        {"activations": "int8"},
    )
    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    activations: str | None = None
    method: str = "rtn"
    damping: float = 0.01
    act_order: bool = True
    budget_bits: float | None = None
    embeddings: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "bits", self.bits, packing.BITS)
        require_choice(self.name, "activations", self.activations, (None, "int8"))
        if self.group_size is not None and self.group_size < 1:
            raise OptionError(
                f"quantize-weights: group_size={self.group_size} holds no weight; use 1 or more."
            )
        plain = (self.bits, self.group_size, self.symmetric) == (8, None, True)
        if self.activations == "int8" and not plain:
            raise OptionError(
                "quantize-weights: activations=int8 needs bits=8, symmetric=true and no group_size."
            )
        require_choice(self.name, "method", self.method, ("rtn", "gptq", "awq"))
        if self.activations == "int8" and (self.method != "rtn" or self.budget_bits is not None):
            raise OptionError("quantize-weights: activations=int8 needs method=rtn and no budget.")
        if not 0 < self.damping < math.inf:
            raise OptionError(
                f"quantize-weights: damping={self.damping} is out of range; use a positive number."
            )
        if self.budget_bits is not None:
            self._check_budget(self.budget_bits)

    def _check_budget(self, bits: float) -> None:
        if not 4 < bits < math.inf:
            raise OptionError(
                f"quantize-weights: budget_bits={bits} is out of range; use more than 4: codes"
                " take 4 at least, and scales some more."
            )
        if (self.bits, self.group_size) != (8, None):
            raise OptionError("quantize-weights: budget_bits chooses bits and group_size itself.")

    def promised(self) -> Promise:
        return self.promise if self.method == "rtn" else Promise.APPROXIMATE

    def calibrates(self) -> bool:
        return self.method != "rtn" or self.budget_bits is not None

    def ends(self) -> frozenset[Fact]:
        everywhere = self.include == ("*",) and not self.exclude
        return frozenset({Fact.DENSE_WEIGHTS}) if everywhere else frozenset()

    def decide(self, region: Weights) -> Codes | Skip:
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        if isinstance(region, Embedding) and not self.embeddings:
            return Skip("is an embedding table; set embeddings=true to quantize it", at=region)
        if region.weight_is_shared:
            return Skip("shares its weight with another place of the model", at=region)
        if isinstance(region, Linear) and region.is_router:
            return Skip("is a router, which would choose other experts", at=region)
        if not region.weight.is_floating_point():
            return Skip(f"has {region.weight.dtype} weights", at=region)
        if not region.weight.numel():
            return Skip("has no weights", at=region)
        features = region.weight.shape[-1]
        if isinstance(region, Embedding):
            return Codes(8, features, True)
        activations = self.activations if isinstance(region, Linear) else None
        codes = coded(region.weight, self.bits, self.group_size, self.symmetric)
        return replace(codes, activations=activations)

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        able = super().plan(program).decisions
        if self.budget_bits is None or not able:
            return None
        bits, group_size = FORMS[0]
        coarse = [
            (region, self.replace(region, coded(region.weight, bits, group_size, self.symmetric)))
            for region in self.regions(program)
            if region.label in able and not isinstance(region, Embedding)
        ]
        return Evidence(count_of(calibration), sensitivities(program, coarse, calibration))

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Codes]:
        plan = super().plan(program)
        if self.budget_bits is not None and plan.decisions:
            plan = self._within_budget(program, plan, evidence)
        if self.method == "awq":
            plan = Plan({**plan.decisions, **self._smoothed(program, plan)}, plan.skips)
        return plan

    def _within_budget(
        self, program: Program, plan: Plan[Codes], evidence: Evidence | None
    ) -> Plan[Codes]:
        """Give every weight the form in which all together change the outputs least."""
        if evidence is None or self.budget_bits is None:
            raise needs_sensitivity()
        found = evidence.regions
        measured = {
            region.label: Measured(region.weight, found[region.label], _scale_bytes(region))
            for region in self.regions(program)
            if region.label in found
        }
        chosen = within_budget(measured, self.budget_bits, self.symmetric)
        decided = {label: chosen.get(label, codes) for label, codes in plan.decisions.items()}
        kept = {label: codes for label, codes in decided.items() if codes is not None}
        floats = dict.fromkeys(
            (n for n in decided if n not in kept), "stays as it is, which the budget allows"
        )
        return Plan(kept, {**plan.skips, **floats})

    def _smoothed(self, program: Program, plan: Plan[Codes]) -> dict[str, Codes]:
        """Return how layers are stored that say who divides their inputs."""
        found: dict[str, Codes] = {}
        for group in together(self._layers(program, plan)):
            norm = folds_into([layer for layer, _ in group])
            smoothing = "factor" if norm is None else "norm"
            found |= {layer.label: replace(codes, smoothing=smoothing) for layer, codes in group}
        return found

    def _layers(self, program: Program, plan: Plan[Codes]) -> list[tuple[Linear, Codes]]:
        """Return the linear layers of a plan, and how their weights are stored."""
        found = [(region, plan.decisions.get(region.label)) for region in self.regions(program)]
        return [(region, codes) for region, codes in found
                if isinstance(region, Linear) and codes and not codes.activations]  # fmt: skip

    def replace(self, region: Weights, codes: Codes) -> nn.Module:
        if isinstance(region, Embedding):
            matrix, scale = quantize_rows(region.weight)
            return QuantizedEmbedding(matrix, scale.to(region.weight.dtype))
        how = (codes.bits, codes.group_size)
        weight = region.weight
        if isinstance(region, StackedWeight):
            stored = quantize_experts(weight, *codes.how)
            return QuantizedExperts(stored, *how, weight.shape[-1])
        if codes.activations:
            limit = int8_linear.WEIGHT_LIMIT
            matrix, scale = quantize_rows(weight, limit)
            return Int8Linear(matrix.t().contiguous(), scale[:, 0].contiguous(), region.bias)
        factor = weight.new_ones(weight.shape[1]) if codes.smoothing == "factor" else None
        return QuantizedLinear(quantize(weight, *codes.how), region.bias, *how, factor)

    def predict(self, region: Weights, codes: Codes) -> Mapping[str, int]:
        weight = region.weight
        new = codes.size_bytes(weight, _scale_bytes(region))
        if codes.smoothing == "factor":
            new += weight.shape[1] * weight.element_size()
        return {"parameters": 0, "weight_bytes": new - weight.numel() * weight.element_size()}

    def calibrate(
        self, old: Program, new: Program, plan: Plan[Codes], calibration: Calibration
    ) -> Mapping[str, Tensor]:
        layers = self._layers(old, plan) if self.method != "rtn" else []
        if not layers:
            return {}
        moments = input_moments(old, [layer for layer, _ in layers], calibration)
        if self.method == "awq":
            return awq_weights(layers, moments)
        return gptq_codes(layers, moments, damping=self.damping, act_order=self.act_order)

    def bound(self, region: Weights, module: nn.Module, *inputs: Tensor) -> Tensor | None:
        if isinstance(module, QuantizedExperts):
            return experts_bound(module)
        (x,) = inputs
        if isinstance(module, QuantizedEmbedding):
            return module.scale[x] / 2
        if isinstance(module, Int8Linear):
            return int8_bound(module.codes, module.scale, x)
        assert isinstance(module, QuantizedLinear)
        return weight_only_bound(module, x)


def _scale_bytes(region: Weights) -> int:
    """Return the bytes of a scale; those of linear layers are kept in fp32."""
    return 4 if isinstance(region, Linear) else region.weight.element_size()
