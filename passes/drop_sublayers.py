"""Remove whole attentions or feed-forward networks from residual blocks.

    pre-norm     y = x + sublayer(norm(x))      ->   y = x
    post-norm    y = norm(x + sublayer(x))      ->   y = norm(x)

What only the sublayer read goes with it: the norm before it, scale, shift and gate of a modulation.
The norm of the sum stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Summand
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
from .shared.influence import Drop, least_first, require_fraction
from .shared.without import apart, sublayer_influence, without

PARTS = ("attention", "feed_forward", "experts", "branch")


@dataclass(frozen=True, kw_only=True)
class DropSublayers(Pass[Summand, Drop]):
    """Drop the sublayers of least influence, those that are named, or random ones.

    A sublayer `blocks.0.attention` has the path `blocks.0.attention.residual` here.

    Attributes:
        keep_ratio: Fraction of the sublayers of these kinds that stay, rounded to whole ones.
        sublayers: Glob patterns of the sublayers to drop; `keep_ratio` and `importance` then say
            nothing.
        importance: `cosine` drops the sublayers that turn their streams least, measured on the
            calibration; `random` any.
        parts: Kinds that may be dropped: `attention`, `feed_forward`, `experts`, `branch`.
        seed: Draws the random sublayers.
        include: Glob patterns of sublayers that may be dropped.
        exclude: Glob patterns of sublayers that stay.

    Raises:
        OptionError: An option is out of range, no sublayer would be left, or influence is not
            measured.

    Source: Men et al., ShortGPT, 2024, arXiv:2403.03853, section 3 (influence); He et al., 2024,
        arXiv:2406.15786 (of sublayers).
    Differs: attentions and feed-forward networks are ranked together; influence is the mean over
        all streams of a sublayer.
    Exact when: `keep_ratio` is 1, or a dropped sublayer adds zero to its streams.
    """

    name: ClassVar[str] = "drop-sublayers"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"importance": "random"})
    keep_ratio: float = 0.75
    sublayers: tuple[str, ...] = ()
    importance: str = "cosine"
    parts: tuple[str, ...] = ("attention", "feed_forward")
    seed: int = 0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "importance", self.importance, ("cosine", "random"))
        for part in self.parts:
            require_choice(self.name, "parts", part, PARTS)
        require_fraction(self.name, self.keep_ratio, of="sublayers")

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        regions = list(self.regions(program))
        if self.sublayers or self.importance != "cosine" or not regions:
            return None
        influence = sublayer_influence(program, regions, calibration)
        return Evidence(count_of(calibration), influence)

    def decide(self, region: Summand) -> Drop | Skip:
        kind = region.sublayer.region.kind
        if kind not in self.parts:
            return Skip(f"is of another kind: {kind}", at=region)
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        return Skip(region.objection, at=region) if region.objection else Drop()

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Drop]:
        able = super().plan(program)
        regions = list(self.regions(program))
        free = [region for region in regions if region.label in able.decisions]
        wanted = self._wanted(free, evidence)
        dropped = {region.label for region in apart(wanted)}
        self._require_rest(regions, dropped)
        influence = evidence.regions if evidence else {}
        skips = dict(able.skips)
        for region in free:
            if region.label not in dropped:
                together = region in wanted
                skips[region.label] = (
                    "joins its stream together with one that is dropped"
                    if together
                    else "is kept: others matter less"
                )
        drops = {r.label: Drop(influence.get(r.label)) for r in free if r.label in dropped}
        return Plan(drops, skips)

    def replace(self, region: Summand, decision: Drop) -> nn.Module:
        return without(region)

    def _wanted(self, free: Sequence[Summand], evidence: Evidence | None) -> list[Summand]:
        """Return the sublayers to drop, in execution order."""
        if self.sublayers:
            return [region for region in free if selected(region.label, self.sublayers, ())]
        count = len(free) - round(self.keep_ratio * len(free))
        if not count:
            return []
        if self.importance == "cosine" and evidence is None:
            raise OptionError(
                f"{self.name}: influence is measured on calibration inputs.",
                remedy="run the pass with calibration=..., so that it is measured first.",
            )
        influence = evidence.regions if evidence else {}
        chosen = set(least_first([r.label for r in free], influence, self.seed)[:count])
        return [region for region in free if region.label in chosen]

    def _require_rest(self, regions: Sequence[Summand], dropped: set[str]) -> None:
        if regions and dropped.issuperset(region.label for region in regions):
            raise OptionError(
                f"{self.name} would drop all {len(regions)} sublayers of the model.",
                remedy="keep one of them with exclude=..., or raise keep_ratio.",
            )
