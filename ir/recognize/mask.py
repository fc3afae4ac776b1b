"""What masks do, proved by evaluating them.

    causal    keys up to the query              window    the last n keys up to the query
    padding   keys the inputs mask out, for every query alike
    bias      numbers added to the scores: relative positions, ALiBi

A mask is an expression over sizes, constants and inputs like `attention_mask`. It is computed for
the shapes in the graph: with inputs full of ones, then with some of their entries zero. What is
said of a mask that depends on an input holds for inputs that mask nothing or whole keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..graphs import remembered
from ..program import Program
from .calls import op
from .expression import Expression, Fill, Place, compute, expression_of, origin_of
from .scores import Term, choice_of

_HIDDEN = -1e4  # scores this much lower get no probability
_KINDS = ("causal", "window", "padding", "bias")


@dataclass(frozen=True)
class Mask:
    """What masks the scores of an attention.

    Attributes:
        kind: `none`; `causal`, `window`, `padding`, `bias`, or several joined by `+`; `input` for
            anything else.
        window: Keys a query sees in a causal window, itself included; else None.
    """

    kind: str = "none"
    window: int | None = None


NONE, CAUSAL, INPUT = Mask(), Mask("causal"), Mask("input")


def mask_of(program: Program, instance: str | None, terms: Sequence[Term], causal: bool) -> Mask:
    """Return what the terms of one attention do together.

    Args:
        program: Where the attention is.
        instance: Block instance it is looked at through; None in the main graph.
        terms: Masks of its scores.
        causal: Whether a flag of the op makes it causal.
    """
    found = [CAUSAL] if causal else []
    for place, form, value in _terms(program, instance, terms):
        found.append(_mask_of(program, place, form, value))
    return _together(found)


def _mask_of(program: Program, place: Place, form: str, value: float) -> Mask:
    """Return what one term does: as a whole, or else what it chooses among and how it chooses."""
    key = (Mask, place, form, value)
    found = remembered(program.main, key, _classifier(program, place, form, value))
    choice = choice_of(place[1]) if found is INPUT and form == "add" else None
    if choice is None or not isinstance(choice[0], fx.Node):
        return found
    scores, condition = choice
    return mask_of(program, place[0], (Term(scores), condition), causal=False)


def _together(found: Sequence[Mask]) -> Mask:
    """Return what several masks do together."""
    kinds = {kind for mask in found for kind in mask.kind.split("+")} - {"none"}
    if "input" in kinds:
        return INPUT
    windows = {mask.window for mask in found if mask.window is not None}
    if windows:
        kinds.discard("causal")
    kind = "+".join(kind for kind in _KINDS if kind in kinds) or "none"
    return Mask(kind, min(windows, default=None))


def _terms(
    program: Program, instance: str | None, terms: Sequence[Term]
) -> Iterator[tuple[Place, str, float]]:
    """Yield the masks a term adds up, each where it is computed."""
    pending = [((instance, term.node), term.form, term.value) for term in reversed(terms)]
    while pending:
        place, form, value = pending.pop()
        place = origin_of(program, place)
        node = place[1]
        if form == "add" and op(node) == "add" and not node.kwargs:
            sides = [side for side in node.args[:2] if isinstance(side, fx.Node)]
            if len(sides) == 2:
                pending += [((place[0], side), form, value) for side in sides]
                continue
        yield place, form, value


def _classifier(
    program: Program, place: Place, form: str, value: float
) -> Callable[[fx.Graph], Mask]:
    """Return a function that says what one mask does."""

    def classify(_: fx.Graph) -> Mask:
        expression = expression_of(program, place)
        if expression is None:
            return INPUT
        if expression.parameters and expression.inputs:
            return INPUT
        return _evaluated(program, expression, form, value)

    return classify


def _evaluated(program: Program, expression: Expression, form: str, value: float) -> Mask:
    """Compute a mask and say what it looks like."""
    try:
        opened, *probes = _values(program, expression)
    except (RuntimeError, IndexError, TypeError, NotImplementedError, KeyError):
        return INPUT  # computed on sizes or devices that are not here
    if any(probe is None or probe.dim() < 2 for probe in (opened, *probes)):
        return INPUT
    assert opened is not None
    kept = _kept(opened, form, value)
    if kept is None:
        counted = all(not n.meta["val"].is_floating_point() for n in expression.inputs)
        soft = opened.is_floating_point() and all(_hides_none(v) for v in (opened, *probes))
        return Mask("bias") if form == "add" and soft and counted else INPUT
    pattern = _pattern(kept, expression)
    if not expression.inputs or pattern is INPUT:
        return pattern
    hidden = [_kept(probe, form, value) for probe in probes if probe is not None]
    if any(masked is None or not _whole_keys(kept, masked) for masked in hidden):
        return INPUT
    return _together([pattern, Mask("padding")])


def _hides_none(mask: Tensor | None) -> bool:
    return mask is not None and bool((mask > _HIDDEN).all())


def _values(program: Program, expression: Expression) -> list[Tensor | None]:
    """Compute the expression with inputs full of ones, then with zeros at the end of some."""
    fills = [_striped(frozenset(), 0)]
    if expression.inputs:
        fills += [_striped(expression.inputs, shift) for shift in (0, 1)]
    return [compute(program, expression, fill) for fill in fills]


def _striped(inputs: frozenset[fx.Node], shift: int) -> Fill:
    """Return a function that fills inputs with ones, and the last half of some with zeros."""

    def fill(node: fx.Node, size: tuple[int, ...]) -> Tensor:
        value = torch.ones(size, dtype=node.meta["val"].dtype)
        if node in inputs and value.dim():
            value[..., size[-1] // 2 + shift :] = 0
        return value

    return fill


def _kept(mask: Tensor, form: str, value: float) -> Tensor | None:
    """Return which scores stay; None when the mask is no choice of scores."""
    if form == "add":
        hidden = mask <= _HIDDEN
        even = (mask == mask[..., :1]).all(dim=-1, keepdim=True)  # adds nothing to any probability
        return ~hidden if bool((hidden | (mask == 0) | even).all()) else None
    if value > _HIDDEN or mask.dtype != torch.bool:
        return None
    return mask if form == "keep" else ~mask


def _pattern(kept: Tensor, expression: Expression) -> Mask:
    """Say which keys each query sees."""
    queries, keys = kept.shape[-2:]
    unsure = expression.dynamic and (expression.largest >= keys or queries == 1)
    if bool(kept.all()):
        return INPUT if unsure else NONE
    first = kept.reshape(-1, queries, keys)[0]
    if queries == 1 or not bool((kept == first).all()):
        return INPUT
    behind = (torch.arange(queries)[:, None] + keys - queries) - torch.arange(keys)
    width = int(behind[first].max()) + 1 if first.any() else 0
    if not torch.equal(first, (behind >= 0) & (behind < width)):
        return INPUT
    if width < keys:
        return Mask("window", width)
    return INPUT if unsure else CAUSAL


def _whole_keys(kept: Tensor, masked: Tensor) -> bool:
    """Whether what is masked out beside the pattern is the same keys for every query."""
    kept, masked = torch.broadcast_tensors(kept, masked)
    hides = kept & ~masked
    keys = hides.any(dim=-2, keepdim=True)
    return bool(((kept & ~keys) == masked).all())
