"""Splicing modules: shared traces, split classes, provenance, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from blockwright.ir.errors import VerifyError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Linear
from blockwright.ir.regions import regions
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run
from blockwright.ir.shapes import fake_mode
from blockwright.ir.trace import trace
from blockwright.ir.verify import verify


class Scaled(nn.Module):
    """The same linear layer, times a constant."""

    def __init__(self, linear: Linear, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight)
        self.bias = nn.Parameter(linear.bias) if linear.bias is not None else None
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) * self.factor


def ups(program: Program) -> list[Linear]:
    return [linear for linear in regions(program, Linear) if linear.label.endswith(".up")]


def test_one_replacement_per_instance_and_one_graph(program: Program, tokens: Tensor) -> None:
    new = rewrite(program, [(up, Scaled(up)) for up in ups(program)], by="test")
    verify(new)
    assert set(new.graphs) == {"main", "block0"}
    assert new.graphs["main"] is program.graphs["main"]
    torch.testing.assert_close(run(new, [tokens]), run(program, [tokens]))


def test_the_old_program_is_untouched(program: Program, tokens: Tensor) -> None:
    text, before = program.text(), run(program, [tokens])[0]
    rewrite(program, [(up, Scaled(up, 3.0)) for up in ups(program)], by="test")
    assert program.text() == text
    assert torch.equal(run(program, [tokens])[0], before)


def test_instances_that_differ_split_their_class(program: Program) -> None:
    first, _second, third = ups(program)
    new = rewrite(program, [(first, Scaled(first, 2.0)), (third, Scaled(third, 2.0))], by="test")
    verify(new)
    blocks = [new.instances[name].block for name in new.instances]
    assert blocks[0] == blocks[2] != blocks[1]
    assert len(new.graphs) == 3


def test_a_program_replaces_one_region(program: Program, tokens: Tensor) -> None:
    region = ups(program)[1]
    new = program.replace(region, Scaled(region), by="by hand")
    verify(new)
    assert len({instance.block for instance in new.instances.values()}) == 2
    torch.testing.assert_close(run(new, [tokens]), run(program, [tokens]))


def test_new_nodes_know_their_pass_and_place(program: Program) -> None:
    new = rewrite(program, [(up, Scaled(up)) for up in ups(program)], by="my-pass")
    (node,) = [n for n in new.graphs["block0"].nodes if "mul" in str(n.target)]
    assert node.meta["from_node"][-1].pass_name == "my-pass"
    assert node.meta["local_path"] == "up"
    assert "blocks" in str(node.meta["nn_module_stack"])


def test_dropped_weights_leave_the_program(program: Program) -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x[..., :4]], dim=-1)

    new = rewrite(program, [(up, Zero()) for up in ups(program)], by="test")
    verify(new)
    assert "blocks.0.up.weight" in program.tensors
    assert "blocks.0.up.weight" not in new.tensors


def test_a_changed_shape_is_refused(program: Program) -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(VerifyError, match=r"test changed the output from \[.*12\].* to \[.*8\]"):
        rewrite(program, [(ups(program)[0], Narrow())], by="test")


def test_a_tensor_made_in_forward_is_refused(program: Program) -> None:
    class Makes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x[..., :4] + torch.tensor([1.0, 2, 3, 4])], dim=-1)

    with pytest.raises(VerifyError, match="makes a tensor inside forward"):
        rewrite(program, [(ups(program)[0], Makes())], by="test")


def test_a_rewritten_program_runs_at_another_batch(program: Program) -> None:
    new = rewrite(program, [(up, Scaled(up)) for up in ups(program)], by="test")
    tokens = torch.randint(0, 32, (7, 8))
    torch.testing.assert_close(run(new, [tokens]), run(program, [tokens]))
    exported = torch.export.export(
        new.module(), (tokens,), dynamic_shapes=[{0: torch.export.Dim("batch", max=64)}]
    )
    torch.testing.assert_close(exported.module()(tokens)[0], run(program, [tokens])[0])


def test_overlapping_regions_are_refused(program: Program) -> None:
    up = ups(program)[0]
    with pytest.raises(VerifyError, match="twice"):
        rewrite(program, [(up, Scaled(up)), (up, Scaled(up, 2.0))], by="test")


def test_a_replacement_that_fixes_a_size_does_not_fix_the_old_program(program: Program) -> None:
    class Fixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            wide = torch.cat([x, x[..., :4]], dim=-1)
            return wide.reshape(int(x.shape[0]), 8, 12)

    before, sizes = program.structure_hash(), program.sizes()
    new = rewrite(program, [(ups(program)[0], Fixes())], by="test")
    assert (program.structure_hash(), program.sizes()) == (before, sizes)
    tokens = torch.randint(0, 32, (5, 8))
    assert run(program, [tokens])[0].shape[0] == 5
    with pytest.raises(RuntimeError, match="invalid for input"):  # loud, not wrong
        run(new, [tokens])


def test_inputs_that_record_one_value_stay_apart(program: Program) -> None:
    """Two nodes made by one trace record the same fake value, and are two inputs all the same."""
    found = next(iter(regions(program, Linear)))
    value = found.inputs[0].meta["val"]

    class Difference(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - y

    mode = fake_mode(program.graphs[found.graph])
    traced = trace(Difference(), [value, value], mode)
    (subtraction,) = (node for node in traced.graph.nodes if node.op == "call_function")
    assert len(set(subtraction.all_input_nodes)) == 2
