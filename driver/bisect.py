"""Find where a recipe goes wrong: the pass, the block, the region, the op.

    program ->  p0  ->  p1  -> [p2] ->  p3          error of p0..pk against the program, by halves
    p2:         b0      b1     [b2]     b3          error with b0..bk rewritten, by halves
    b2:         query   key    [value]              the same for the regions of the block
    value:      linear  ->  [mul]                   old and new side by side, in fp32 and fp64

With n passes, m blocks and r regions in a block that is at most 4 + log2 n + log2 m + log2 r runs
of the model, logarithms rounded up. `bisect_search` says what halving can promise; the report says
whether the block exceeds the bound alone, or is only where errors of many blocks add up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..ir.program import Program
from ..ir.regions import Region
from ..ir.run import run
from ..passes.base import Pass
from .bisect_op import OpFault, find_op
from .bisect_pass import Applied, Replacement, by_block
from .bisect_search import Bound, Evaluator, Measured, crossing
from .facts import check_recipe
from .numerics import Inputs

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Culprit:
    """Where the error crosses the bound.

    Attributes:
        applied: The pass with its plan.
        position: Its place in the recipe, from 0.
        block: Label of the block.
        region: The replaced region.
        module: What stands in its place.
        before: Error with everything before the region replaced.
        after: Error with the region replaced as well.
        alone: Error with this block alone replaced, after the passes before.
        op: What goes wrong inside the module.
        values: What the region read on the input set with the largest error.
        inputs: That input set.
    """

    applied: Applied
    position: int
    block: str
    region: Region
    module: Any
    before: Measured
    after: Measured
    alone: Measured
    op: OpFault
    values: list[Any]
    inputs: Inputs

    @property
    def pass_(self) -> Pass[Any, Any]:
        """The pass."""
        return self.applied.pass_

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        plan = self.applied.restricted([(self.region, self.module)]).to_json()
        return {
            "pass": str(self.pass_),
            "position": self.position,
            "block": self.block,
            "region": self.region.label,
            "decision": plan["decisions"][self.region.label],
            "error": {
                "before": self.before.error,
                "after": self.after.error,
                "block_alone": self.alone.error,
                "region": self.op.region_error,
            },
            "accumulates": not self.alone.beyond,
            "op": {
                "verdict": self.op.verdict,
                "op": self.op.op,
                "error": self.op.error,
                "nearest": self.op.nearest,
                "text": str(self.op),
            },
        }


@dataclass(frozen=True)
class Bisection:
    """What a bisection found.

    Attributes:
        bound: What was asked for.
        error: Error of the whole recipe.
        culprit: Where it crosses the bound; None when the whole recipe stays within.
        runs: Runs of the model it took.
    """

    bound: Bound
    error: float
    culprit: Culprit | None
    runs: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "within": self.culprit is None,
            "metric": self.bound.metric,
            "bound": self.bound.limit,
            "error": self.error,
            "runs": self.runs,
            "culprit": self.culprit.to_json() if self.culprit else None,
        }


def bisect(
    program: Program,
    passes: Sequence[Pass[Any, Any]],
    inputs: Sequence[Inputs],
    bound: Bound,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Bisection:
    """Find the pass, block, region and op at which a recipe exceeds a bound.

    Args:
        program: What the recipe starts from. Every program on the way is kept, so memory grows
            with the weights that passes replace.
        passes: The recipe; promises are not checked on the way.
        inputs: Flat inputs in the order of main's placeholders, one or more sets.
        bound: How far the outputs may move.
        seed: Seed of the random numbers of each pass.
        progress: Called with (what runs, steps done, steps in all).

    Raises:
        OptionError: The recipe as a whole cannot work.
        NoMatchError: A pass changes nothing.
    """
    check_recipe(passes)
    say = progress or (lambda what, done, total: None)
    evaluate = Evaluator(program, inputs, bound)
    programs, steps = [program], list[Applied]()
    for index, pass_ in enumerate(passes):
        say(pass_.name, index, len(passes))
        steps.append(Applied.of(pass_, programs[-1], inputs, seed=seed))
        programs.append(steps[-1].after())
    prefixes = _Prefixes(evaluate, programs.__getitem__, say, "passes")
    whole = prefixes(len(passes))
    if not whole.beyond:
        return Bisection(bound, whole.error, None, evaluate.runs)
    index = crossing(prefixes.beyond, 0, len(passes))
    ends = prefixes(index - 1), prefixes(index)
    culprit = _within_pass(steps[index - 1], index - 1, ends, evaluate, say)
    return Bisection(bound, whole.error, culprit, evaluate.runs)


class _Prefixes:
    """Errors by how much has been done: measured once each, nothing done is no error."""

    def __init__(
        self,
        evaluate: Evaluator,
        program_of: Callable[[int], Program],
        say: Progress,
        what: str,
        known: dict[int, Measured] | None = None,
    ) -> None:
        self.evaluate, self.program_of, self.say, self.what = evaluate, program_of, say, what
        self.known = known or {0: Measured(0.0, False)}

    def __call__(self, count: int) -> Measured:
        if count not in self.known:
            self.say(f"bisect {self.what}", self.evaluate.runs, 0)
            self.known[count] = self.evaluate(self.program_of(count))
        return self.known[count]

    def beyond(self, count: int) -> bool:
        return self(count).beyond


def _within_pass(
    applied: Applied,
    position: int,
    ends: tuple[Measured, Measured],
    evaluate: Evaluator,
    say: Progress,
) -> Culprit:
    """Find the block, then the region: the last replacement made decides."""
    groups = by_block(applied.before, applied.replaced)
    names, parts = list(groups), list(groups.values())

    def first(count: int) -> list[Replacement]:
        return [pair for group in parts[:count] for pair in group]

    blocks = _Prefixes(
        evaluate, lambda n: applied.after(first(n)), say, "blocks",
        {0: ends[0], len(parts): ends[1]},
    )  # fmt: skip
    place = crossing(blocks.beyond, 0, len(parts))
    done, block = first(place - 1), parts[place - 1]
    regions = _Prefixes(
        evaluate, lambda n: applied.after(done + block[:n]), say, "regions",
        {0: blocks(place - 1), len(block): blocks(place)},
    )  # fmt: skip
    last = crossing(regions.beyond, 0, len(block))
    region, module = block[last - 1]
    single = len(parts) == 1
    alone = blocks(place) if single or place == 1 else evaluate(applied.after(block))
    inputs = evaluate.inputs[regions(last).worst]
    values = observed(applied.before, region, inputs)
    evaluate.runs += 1
    return Culprit(
        applied=applied,
        position=position,
        block=names[place - 1],
        region=region,
        module=module,
        before=regions(last - 1),
        after=regions(last),
        alone=alone,
        op=find_op(region, module, values),
        values=values,
        inputs=inputs,
    )


def observed(program: Program, region: Region, inputs: Inputs) -> list[Any]:
    """Run a program and return what one of its regions reads."""
    return watched(program, region.instance, region.inputs, inputs)


def watched(
    program: Program, instance: str | None, nodes: Sequence[fx.Node], inputs: Inputs
) -> list[Any]:
    """Run a program and return the values of some nodes of one block instance."""
    wanted, seen = set(nodes), dict[fx.Node, Any]()

    def keep(place: str | None, node: fx.Node, value: Any) -> None:
        if place == instance and node in wanted:
            seen[node] = value

    run(program, inputs, on_node=keep)
    return [seen[node] for node in nodes]
