"""What the attributes of a foreign operator say, against what is known of the part it stands for.

An attribute that is left out has a default; a fusion that forgets one keeps the graph valid and
changes what it computes. Defaults are those of ONNX Runtime's contrib operators and of ONNX.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..ir.recognize import Attention, Norm
from ..ir.regions import Region
from .foreign import Step


@dataclass(frozen=True)
class Claim:
    """What an attribute of an operator says about a part of a model.

    Attributes:
        name: Of the attribute.
        says: Reads the claim off the attribute, or off None where it is left out.
        ours: The constant of the part; None when unknown.
        word: What the constant is called.
        ops: Operators that have the attribute.
        absent: Whether a constant that is None is known not to be there, and not unknown.
    """

    name: str
    says: Callable[[Any, Any], Any]
    ours: Callable[[Any], Any]
    word: str
    ops: tuple[str, ...]
    absent: bool = False


_FUSED = ("GroupQueryAttention", "MultiHeadAttention", "Attention")
_GROUPED = ("GroupQueryAttention",)
_NORMS = (
    "LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "RMSNormalization",
)  # fmt: skip


def _scale(value: Any, region: Attention) -> Any:
    if value:
        return value
    return region.head_dim and 1 / math.sqrt(region.head_dim)


ATTENTION = (
    Claim("local_window_size", lambda v, _: None if v in (None, -1) else v,
          lambda r: r.window, "window", _GROUPED, absent=True),
    Claim("softcap", lambda v, _: v or None, lambda r: r.softcap, "softcap", _GROUPED, absent=True),
    Claim("scale", _scale, lambda r: r.scale, "scale", _FUSED),
    Claim("rotary_embedding_dim", lambda v, r: v or r.head_dim,
          lambda r: r.rotary.dims, "rotary dims", ("RotaryEmbedding",)),
    Claim("num_heads", lambda v, _: v, lambda r: r.heads, "heads", _FUSED),
    Claim("kv_num_heads", lambda v, _: v, lambda r: r.kv_heads, "kv_heads", _GROUPED),
)  # fmt: skip
NORM = (Claim("epsilon", lambda v, _: 1e-5 if v is None else v, lambda r: r.eps, "eps", _NORMS),)


def kind_of(op: str) -> type[Region] | None:
    """Return the kind of part an operator stands for; None for one that may be anywhere."""
    if op in _FUSED:
        return Attention
    return Norm if op in _NORMS else None


def hints_for(step: Step, literals: Mapping[str, Any], region: Region | None) -> Iterator[str]:
    """Yield the contradictions between an operator and the part of the model it stands for.

    Args:
        step: The operator.
        literals: Its attributes and the small constants it reads.
        region: The part.
    """
    claims = {Attention: ATTENTION, Norm: NORM}.get(type(region), ())
    for claim in claims:
        if step.op not in claim.ops:
            continue
        given = step.attributes.get(claim.name)
        theirs, ours = claim.says(given, region), claim.ours(region)
        if (ours is not None or claim.absent) and not _agree(theirs, ours):
            said = "is left out" if given is None else f"is {_number(given)}"
            yield f"{claim.name} {said}; the model has {claim.word} {_number(ours)}"


def _agree(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, int | float) and isinstance(ours, int | float):
        return math.isclose(theirs, ours, rel_tol=1e-4)
    return theirs == ours or (theirs is None and ours is None)


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
