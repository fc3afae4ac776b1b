"""How two passes go together: in both orders, in one, or not at all.

Both orders run on a model, every pass certified. What comes out decides:

    commutes   both orders work, and give the same program, or the same outputs
    ordered    one order works, or both do and give different results
    refused    neither works: what one pass leaves is not what the other needs
    fails      an order breaks: a promise is not kept, an invariant is violated
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..driver.manager import run_passes
from ..driver.numerics import relative
from ..ir.errors import NoMatchError, OptionError
from ..ir.graphs import output_nodes
from ..ir.program import Program
from .case import AnyPass, eager_runs, outputs
from .families import Family
from .tolerance import t0, t1

NEARER = 1.25  # errors within this factor are called equal
IDLE = "finds nothing to do in the model"


class Word(StrEnum):
    """How a pair goes together; see the module."""

    COMMUTES = "commutes"
    ORDERED = "ordered"
    REFUSED = "refused"
    FAILS = "fails"


@dataclass(frozen=True)
class Verdict:
    """What was found of a pair on one model.

    Attributes:
        word: The class.
        why: A sentence about it, the same wherever the same happens.
    """

    word: Word
    why: str

    @property
    def idle(self) -> bool:
        """Whether a pass finds nothing to do there in any order, which says nothing of the pair."""
        return self.word is Word.REFUSED and IDLE in self.why


@dataclass(frozen=True)
class Trouble:
    """An order that did not work.

    Attributes:
        why: What stood against it.
        ours: Whether it was refused on purpose.
    """

    why: str
    ours: bool


def variants(kinds: Sequence[type[AnyPass]]) -> list[AnyPass]:
    """Return every pass with each of the options its class gives in `examples`."""
    return [kind(**options) for kind in kinds for options in kind.examples]


def classify(model: Family, first: AnyPass, second: AnyPass) -> Verdict:
    """Run two passes in both orders and say how they go together.

    Args:
        model: What they run on.
        first: A pass.
        second: A pass; the same one to ask whether it can run twice.
    """
    one = attempt(model, first, second)
    two = one if first == second else attempt(model, second, first)
    for found in (one, two):
        if isinstance(found, Trouble) and not found.ours:
            return Verdict(Word.FAILS, found.why)
    if isinstance(one, Trouble) and isinstance(two, Trouble):
        return Verdict(Word.REFUSED, "; ".join(dict.fromkeys((one.why, two.why))))
    if isinstance(one, Trouble):
        return Verdict(Word.ORDERED, f"`{second}` first, because otherwise {one.why}")
    if isinstance(two, Trouble):
        return Verdict(Word.ORDERED, f"`{first}` first, because otherwise {two.why}")
    if first == second:
        return Verdict(Word.COMMUTES, "a second run finds more to do")
    return _compare(model, first, second, one, two)


def attempt(model: Family, first: AnyPass, second: AnyPass) -> Program | Trouble:
    """Run two passes one after the other, certified."""
    try:
        return run_passes(model.program, [first, second], [model.inputs])[0]
    except NoMatchError:
        for pass_ in (first, second):
            if not _matches(model, pass_):
                return Trouble(f"`{pass_}` {IDLE}", ours=True)
        return Trouble(f"`{second}` finds nothing to do after `{first}`", ours=True)
    except OptionError as error:
        return Trouble(error.what.rstrip("."), ours=True)
    except Exception as error:  # whatever it is, the page must show it
        reason = " ".join(str(error).split())
        return Trouble(f"`{first}, {second}`: {type(error).__name__}: {reason}", ours=False)


def _compare(model: Family, first: AnyPass, second: AnyPass, one: Program, two: Program) -> Verdict:
    """Compare what two orders gave."""
    if _same(one, two):
        return Verdict(Word.COMMUTES, "both orders give the same program")
    results = len(output_nodes(model.program.main))  # state that passes declare comes behind
    a, b = (outputs(each, model.inputs)[:results] for each in (one, two))
    if _holds(t0, a, b):
        return Verdict(Word.COMMUTES, "both orders give the same outputs, bit by bit")
    truth = outputs(one, model.inputs, torch.float64)[:results]
    shaken = [values[:results] for values in eager_runs(one, model.inputs)]
    if _holds(t1, b, shaken, truth):
        return Verdict(Word.COMMUTES, "both orders give the same outputs up to rounding")
    errors = [_error(model, result) for result in (a, b)]
    if max(errors) < NEARER * min(errors):
        return Verdict(Word.ORDERED, "both orders work, with other results that are as near")
    nearer, other = (first, second) if errors[0] < errors[1] else (second, first)
    return Verdict(Word.ORDERED, f"both orders work; nearer to the model is `{nearer}, {other}`")


def _same(one: Program, two: Program) -> bool:
    """Whether two programs are equal, weights by name and bit included."""
    if one.structure_hash() != two.structure_hash() or one.tensors.keys() != two.tensors.keys():
        return False
    return all(_holds(t0, [one.tensors[name]], [two.tensors[name]]) for name in one.tensors)


def _error(model: Family, result: Sequence[Tensor]) -> float:
    truth = outputs(model.program, model.inputs, torch.float64)
    return max(relative(new, old) for new, old in zip(result, truth, strict=True))


def _holds(rule: Any, *values: Any) -> bool:
    try:
        rule(*values)
    except AssertionError:
        return False
    return True


@cache
def _matches(model: Family, pass_: AnyPass) -> bool:
    """Whether a pass finds something to do in a model."""
    evidence = pass_.measure(model.program, [model.inputs])
    return bool(pass_.plan(model.program, evidence).decisions)
