"""A program judged with some of its parts changed, without rebuilding it.

    view = View(program, judged)
    view.losses([(attention, masked)])              the loss of each sample, [samples]

What lies before the changed parts is computed once: `view.stop(node)` runs every input up to a node
of the main graph, and what is judged from then on goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx

from ...ir.errors import OptionError
from ...ir.program import Program
from ...ir.regions import Region
from ...ir.run import Paused, run, run_on, run_until
from ..base import Judged

Change = tuple[Region, Callable[..., Any]]
CACHE_BYTES = 2**28


class View:
    """A program and the inputs it is judged on.

    Args:
        program: What is judged.
        judged: Inputs with targets.
        cache_bytes: Memory for values that are computed once; what does not fit is computed again.

    Attributes:
        evaluations: How often all inputs have been judged.
    """

    def __init__(self, program: Program, judged: Judged, cache_bytes: int = CACHE_BYTES) -> None:
        self.program, self.judged, self.cache_bytes = program, judged, cache_bytes
        self.evaluations = 0
        self._paused: list[Paused] = []

    def stop(self, node: fx.Node | None, changes: Sequence[Change] = ()) -> None:
        """Keep the values before a node of the main graph, with changes; None keeps nothing."""
        self._paused = []
        used = 0
        for inputs in self.judged if node is not None else ():
            assert node is not None
            paused = run_until(self.program, inputs, node, instead=changes)
            used += sum(_bytes(value) for value in paused.env.values())
            if used > self.cache_bytes:
                return
            self._paused.append(paused)

    def losses(self, changes: Sequence[Change] = ()) -> Float[Tensor, " samples"]:
        """Return the loss of each sample; changes before the node of `stop` are those it was told.

        Raises:
            OptionError: There are no samples.
        """
        self.evaluations += 1
        found = []
        for index, (inputs, target) in enumerate(self.judged.pairs()):
            if index < len(self._paused):
                outputs = run_on(self.program, self._paused[index], instead=changes)
            else:
                outputs = run(self.program, inputs, instead=changes)
            found.append(self.judged.loss(outputs, target).detach().double())
        if not found:
            raise OptionError(
                "the model is judged on samples, and there are no samples.",
                where="the calibration",
                remedy="give it as pairs (inputs, target), as often as one asks.",
            )
        return torch.cat(found)


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
