"""What changed between two blocks, in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .diff_align import Key, align
from .diff_units import Part, Unit

NAMED = 3  # tensors named of those that differ
SMALLEST = 0.005  # change of FLOPs or bytes worth a word


def changes(old: Unit | None, new: Unit | None) -> tuple[str, ...]:
    """Say how a unit changed; nothing when it did not."""
    if old is None or new is None:
        return ("dropped" if new is None else "added",)
    roles = _roles(old, new)
    replaced = {role for role in roles if _is_replaced(role, old, new)}
    words = [text for role in roles for text in _role(role, old, new, replaced)]
    words += _ops(old.body.loose, new.body.loose)
    if not words and old.body.structure != new.body.structure:
        words += _ops(old.body.ops, new.body.ops) or ["sizes, arguments or order of ops differ"]
    values = _values(old.weights, new.weights)
    words += [values] if values else []
    costs = {"FLOPs": (old.body.flops, new.body.flops), "bytes": (old.size_bytes, new.size_bytes)}
    words += [f"{name} {percent(*pair)}" for name, pair in costs.items() if _tells(*pair)]
    return tuple(words)


def percent(old: float, new: float) -> str:
    """Return a change as `-61 %`."""
    return f"{100 * (new - old) / old:+.0f} %" if old else f"0 -> {new:,}"


def rows(old: Unit | None, new: Unit | None) -> list[tuple[Part | None, Part | None]]:
    """Return the parts of a unit side by side, by role and path."""
    left, right = (unit.body.parts if unit else () for unit in (old, new))
    keys: list[Key[Part]] = [_place, _part_role]
    pairs = align(left, right, keys)
    return list(pairs)


def part_text(part: Part | None) -> str:
    """Return a part by its constants, `heads 12, kv heads 12, ...`, or in words."""
    if part is None:
        return "-"
    named = [f"{_constant(n)} {_show(v)}".strip() for n, v in part.constants.items()]
    return ", ".join(named) or part.words


def differs(old: Part | None, new: Part | None) -> bool:
    """Whether a part was changed, dropped or added."""
    if old is None or new is None:
        return True
    return (part_text(old), old.flops, old.size_bytes) != (
        part_text(new), new.flops, new.size_bytes,
    )  # fmt: skip


def same_values(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors of one type hold the same numbers; NaN equals NaN."""
    if old is new or old.is_meta or new.is_meta:
        return True
    if torch.equal(old, new):
        return True
    return old.is_floating_point() and bool(torch.allclose(old, new, 0.0, 0.0, equal_nan=True))


def _place(part: Part) -> tuple[str, str]:
    return part.role, part.path


def _part_role(part: Part) -> str:
    return part.role


def _roles(old: Unit, new: Unit) -> list[str]:
    return list(dict.fromkeys(part.role for unit in (old, new) for part in unit.body.parts))


def _is_replaced(role: str, old: Unit, new: Unit) -> bool:
    """Whether regions of a role came or went, their layers with them."""
    counts = [sum(p.role == role and bool(p.constants) for p in u.body.parts) for u in (old, new)]
    return counts[0] != counts[1]


def _role(role: str, old: Unit, new: Unit, replaced: set[str]) -> Iterator[str]:
    """Compare the parts of one role: constant by constant, or as kinds that come and go."""
    before, after = (
        [p for p in unit.body.parts if p.role == role and p.within not in replaced]
        for unit in (old, new)
    )
    if len(before) == len(after) and all(part.constants for part in (*before, *after)):
        moved: Counter[str] = Counter()
        for a, b in zip(before, after, strict=True):
            moved.update(_constants(role, a.constants, b.constants))
        for text, count in moved.items():
            yield text if count == 1 else f"{text} ({count} times)"
        return
    gone = Counter(p.words for p in before)
    come = Counter(p.words for p in after)
    gone, come = gone - come, come - gone
    if gone and come and gone.total() == come.total():
        yield f"{_counted(gone.total(), role)} {_listed(gone)} -> {_listed(come)}"
    elif {p.words for p in before} == {p.words for p in after} and len(before) != len(after):
        yield f"{role} {len(before)} -> {len(after)}"
    elif gone and come:
        yield f"{role} {_listed(gone, True)} -> {_listed(come, True)}"
    elif gone or come:
        counts = gone or come
        yield f"{_counted(counts.total(), role)} {_listed(counts)} {'dropped' if gone else 'added'}"


def _counted(number: int, role: str) -> str:
    """Return `4 linear layers`, `1 linear layer`, and `FFN` for what has no plural."""
    if not role.endswith("s"):
        return role
    return f"{number} {role.removesuffix('s') if number == 1 else role}"


def _constants(role: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in {**old, **new}:
        a, b = old.get(name), new.get(name)
        if _show(a) != _show(b):
            spoken = " ".join(filter(None, (role, _constant(name))))
            yield f"{spoken} {_show(a)} -> {_show(b)}"


def _ops(old: Counter[str], new: Counter[str]) -> list[str]:
    gone, come = old - new, new - old
    texts = [f"{sign}{n} {name}" for sign, ops in (("-", gone), ("+", come))
             for name, n in ops.items()]  # fmt: skip
    return [f"ops {' '.join(texts)}"] if texts else []


def _values(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> str:
    alike = [n for n in old if n in new and _type(old[n]) == _type(new[n])]
    moved = [name for name in alike if not same_values(old[name], new[name])]
    if not moved:
        return ""
    named = ", ".join(moved[:NAMED]) + (", ..." if len(moved) > NAMED else "")
    return f"weights differ in {len(moved)} tensor{'s' if len(moved) > 1 else ''}: {named}"


def _tells(old: float, new: float) -> bool:
    return abs(new - old) > SMALLEST * old if old else new != old


def _type(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype


def _listed(counts: Counter[str], numbers: bool = False) -> str:
    several = numbers or len(counts) > 1
    return ", ".join(f"{n} x {words}" if several else words for words, n in counts.items())


def _constant(name: str) -> str:
    return name.replace("_", " ")


def _show(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        value = [each for each in value.values() if each is not None]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " + ".join(map(_show, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "unknown", True: "yes", False: "no"}[value]
    return str(value)
