"""The text form: readable, stable, and a good diff."""

from __future__ import annotations

from collections.abc import Callable

from blockwright.driver.manager import run_passes
from blockwright.ir.program import Program
from blockwright.ir.text import diff_text
from blockwright.passes import FuseProjections


def test_golden_text(program: Program, golden: Callable[[str, str], None]) -> None:
    golden("gpt", program.text())


def test_a_program_differs_from_itself_in_nothing(program: Program) -> None:
    assert diff_text(program, program) == ""


def test_a_diff_shows_only_what_changed(program: Program) -> None:
    fused, _ = run_passes(program, [FuseProjections()])
    lines = diff_text(program, fused).splitlines()
    changed = [line for line in lines if line[0] in "+-" and not line.startswith(("+++", "---"))]
    assert any("query_key_value" in line for line in changed)
    assert not any("gelu" in line or "norm =" in line for line in changed)


def test_the_hash_is_of_structure_not_of_values(program: Program) -> None:
    doubled = {name: tensor * 2 for name, tensor in program.tensors.items()}
    assert program.with_(tensors=doubled).structure_hash() == program.structure_hash()
    fused, _ = run_passes(program, [FuseProjections()])
    assert fused.structure_hash() != program.structure_hash()
