"""What a pass may ask of a program, as a small closed vocabulary.

A pass says which facts it requires, which it ends and which it establishes. It never speaks of
another pass: whoever runs a list of passes derives from the facts what may follow what.
"""

from __future__ import annotations

from enum import StrEnum

from torch import fx

from .ops import OPS
from .program import MAIN, Program
from .regions import local_path


class Fact(StrEnum):
    """A sentence about a program.

    | member | checked on the graph |
    |---|---|
    | `DENSE_WEIGHTS` | some weight is no table of codes, or there are no codes |
    | `CANONICAL` | nothing is spelled out that PyTorch has one op for |
    | `CALIBRATED` | never: a graph does not show where statistics come from |
    | `PLAIN_FEED_FORWARDS` | a residual block holds a plain or gated feed-forward network |
    | `DISTINCT_BLOCKS` | no two blocks of a class read the same weights throughout |

    Attributes:
        thing: What the fact is about.
        ended: What a pass that ends it does to the thing.
        needed: What a pass that requires it does with the thing.
    """

    thing: str
    ended: str
    needed: str

    DENSE_WEIGHTS = ("weights are dense", "the weights", "packs", "must read in floating point")
    CANONICAL = ("each idea is one op", "the ops", "spells out", "must recognise")
    CALIBRATED = (
        "calibration is still valid", "the activations", "changes", "was calibrated on"
    )  # fmt: skip
    PLAIN_FEED_FORWARDS = (
        "feed-forward networks are plain or gated", "the feed-forward networks", "replaces",
        "must look into",
    )  # fmt: skip
    DISTINCT_BLOCKS = (
        "blocks have weights of their own", "the blocks", "ties together", "must tell apart"
    )  # fmt: skip

    def __new__(cls, sentence: str, thing: str, ended: str, needed: str) -> Fact:
        """Make a member that equals its sentence."""
        fact = str.__new__(cls, sentence)
        fact._value_ = sentence
        fact.thing, fact.ended, fact.needed = thing, ended, needed
        return fact


def objection(program: Program, fact: Fact) -> tuple[str, str] | None:
    """Say why a fact does not hold of a program: what is wrong, and where; None when it holds."""
    if fact is Fact.DENSE_WEIGHTS:
        return _all_packed(program)
    if fact is Fact.CANONICAL:
        return _spelled_out(program)
    if fact is Fact.PLAIN_FEED_FORWARDS and not program.feed_forwards():
        return "the model has no feed-forward network that is plain or gated", "the whole model"
    if fact is Fact.DISTINCT_BLOCKS:
        return _twins(program)
    return None


def _all_packed(program: Program) -> tuple[str, str] | None:
    """Weights that are packed in places leave work elsewhere; only all of them are too many."""
    from .recognize import Linear

    packed = [(name, node) for name, graph in program.graphs.items()
              for node in graph.nodes if str(node.target) in OPS]  # fmt: skip
    if not packed or program.regions(Linear):
        return None
    name, node = packed[0]
    return f"the weights are packed already{_maker(node)}", _place(name, node)


def _spelled_out(program: Program) -> tuple[str, str] | None:
    from .recognize.repeated import RepeatedHeads
    from .recognize.spelled import SpelledActivation, SpelledAttention, TransposedLinear

    for kind in (SpelledActivation, SpelledAttention, RepeatedHeads, TransposedLinear):
        for region in program.regions(kind):
            if isinstance(region, SpelledAttention | TransposedLinear) and region.gap:
                continue  # there is no one op for it, or none for it alone
            return f"a {kind.kind} takes {len(region.nodes)} ops", region.label
    return None


def _twins(program: Program) -> tuple[str, str] | None:
    seen: dict[object, str] = {}
    for name, instance in program.instances.items():
        if instance.weights:
            twin = seen.setdefault((instance.block, *sorted(instance.weights.items())), name)
            if twin != name:
                return f"{name} and {twin} read the same weights", name
    return None


def _maker(node: fx.Node) -> str:
    sources = node.meta.get("from_node") or []
    return f" (by {sources[-1].pass_name})" if sources else ""


def _place(graph: str, node: fx.Node) -> str:
    block = "" if graph == MAIN else graph
    return ".".join(filter(None, (block, local_path(node)))) or node.name
