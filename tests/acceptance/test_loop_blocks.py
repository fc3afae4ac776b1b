"""LoopBlocks on a trained decoder of eight blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.passes import LoopBlocks

if TYPE_CHECKING:
    from blockwright.testing.acceptance import Acceptance
    from blockwright.testing.toys import Toy

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_loop_beats_dropping_its_turns(toy_deep_gpt: Toy, acceptance: Acceptance) -> None:
    dense = capture(toy_deep_gpt.model, toy_deep_gpt.example_inputs)
    sets = [list(inputs) for inputs in toy_deep_gpt.calibration(32)]

    def bits(program: Program) -> float:
        module = program.module()
        return toy_deep_gpt.quality(lambda tokens: module(tokens)[0])["bits_per_character"]

    found: dict[int, tuple[float, float]] = {}
    sizes = set[int]()
    for turns in (4, 1):
        pass_ = LoopBlocks(before=2, after=2, turns=turns, start="first", epochs=8, rate=1e-3)
        raw, _ = run_passes(dense, [pass_])
        new, (step,) = run_passes(dense, [pass_], calibration=sets)
        found[turns] = bits(raw), bits(new)
        sizes.add(step.receipt.parameters[1])
    loop, dropped = found[4], found[1]
    assert len(sizes) == 1
    acceptance(
        "algoformer",
        3,
        "A loop of one block in the place of four, distilled, is better than that block alone.",
        naive="drop the other three, distil as long",
        figure=f"{loop[1]:.3f} against {dropped[1]:.3f} bits per character after 256 steps"
        f" ({bits(dense):.3f} with all blocks; {loop[0]:.3f} and {dropped[0]:.3f} before)",
        holds=loop[1] < dropped[1],
    )
    assert loop[1] < loop[0]
    assert dropped[1] < dropped[0]
