"""What a graph read from a file may call: pure ops and integer arithmetic, found by name."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from .branches import COND
from .errors import ArtefactError
from .ops import OPS

_OVERLOAD = re.compile(r"(aten|prims)\.(\w+)\.(\w+)", re.ASCII)
_OPENS_FILES = {"aten::from_file"}

_ARITHMETIC = (
    *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv),
    *(operator.truediv, operator.mod, operator.neg, operator.pos, operator.abs, operator.pow),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.and_, operator.or_, operator.not_),
    *(math.ceil, math.floor, math.trunc, round),
    *(torch.sym_float, torch.sym_int, torch.sym_ite, torch.sym_max, torch.sym_min),
    *(torch.sym_not, torch.sym_sum, torch._sym_sqrt),  # type: ignore[attr-defined]
)
_CHOICE = "higher_order.cond"
_BY_NAME: Mapping[str, Callable[..., Any]] = {
    f"{f.__module__}.{f.__name__}": f for f in _ARITHMETIC
} | {_CHOICE: COND}


def target_name(target: object) -> str:
    """Name what a node calls, as in `aten.linear.default` or `_operator.getitem`.

    Raises:
        ArtefactError: `resolve` would not find it again.
    """
    if target is COND:
        name = _CHOICE
    elif isinstance(target, OpOverload):
        name = str(target)
    else:
        name = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"
    resolve(name)
    return name


@cache
def resolve(name: str) -> Callable[..., Any]:
    """Return what `target_name` named. Nothing outside the list is looked up, let alone called.

    Raises:
        ArtefactError: The name is not on the list.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name in OPS:
        overload: Callable[..., Any] = OPS[name].overload
        return overload
    match = _OVERLOAD.fullmatch(name)
    if match:
        packet = getattr(getattr(torch.ops, match[1]), match[2], None)
        found = getattr(packet, match[3], None)
        if isinstance(found, OpOverload) and _is_pure(found):
            return found
    raise ArtefactError(
        f"{name!r} is not an operation that an artefact may hold.",
        remedy="an artefact holds ops of aten and blockwright that change none of their inputs.",
    )


def _is_pure(overload: OpOverload) -> bool:
    """Say whether an op computes values from values: no writing, printing, reading of files."""
    schema = overload._schema
    types = [str(item.type) for item in (*schema.arguments, *schema.returns)]
    return (
        not schema.is_mutable
        and bool(schema.returns)
        and any("Tensor" in text for text in types)
        and not any("Dict" in text for text in types)
        and schema.name not in _OPENS_FILES
    )
