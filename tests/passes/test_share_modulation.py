"""Blocks share the layer of their modulation and keep an offset each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blockwright.driver.manager import run_passes
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Modulation
from blockwright.ir.run import run
from blockwright.passes import DropBlocks, QuantizeWeights, ShareModulation
from blockwright.passes.share_modulation import mean_rows
from blockwright.testing.families import Family, family


@pytest.fixture(scope="module")
def dit() -> Family:
    return family("dit")


@pytest.fixture(scope="module")
def flux() -> Family:
    return family("flux")


def layers_of(program: Program) -> dict[str, list[str]]:
    """Return the names of what each modulation's layers read, tables left out."""
    return {
        m.label: [
            m.tensor_name(n) for layer in m.layers for n in (layer.weight_node, layer.bias_node)
        ]
        for m in program.regions(Modulation)
    }


def with_equal_modulations(program: Program) -> Program:
    tensors = dict(program.tensors)
    first, *others = layers_of(program).values()
    for names in others:
        for name, source in zip(names, first, strict=True):
            tensors[name] = tensors[source].clone()
    return program.with_(tensors=tensors)


def test_golden(dit: Family, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(dit.program, [ShareModulation()], [dit.inputs])
    golden("share_modulation", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_one_layer_serves_all_blocks_and_each_has_a_table(dit: Family) -> None:
    new, (step,) = run_passes(dit.program, [ShareModulation()], [dit.inputs])
    found = list(new.regions(Modulation))
    assert len({tuple(names) for names in layers_of(new).values()}) == 1
    assert [len(m.tables) for m in found] == [1, 1]
    assert len({m.tensor_name(m.tables[0]) for m in found}) == 2
    assert [block.gate_kind for block in new.blocks()] == ["table", "table"]
    dim = dit.program.blocks()[0].modulation.layers[0].in_features
    saved = (dim + 1) * 6 * dim - 2 * 6 * dim
    assert step.receipt.parameters == (dit.program.cost().parameters,
                                       dit.program.cost().parameters - saved)  # fmt: skip
    assert step.receipt.statistics == {"layers": 2, "shared layers": 1}


@pytest.mark.parametrize("across", ["kind", "model"])
def test_equal_layers_give_the_same_bits(dit: Family, across: str) -> None:
    equal = with_equal_modulations(dit.program)
    new, _ = run_passes(equal, [ShareModulation(across=across)], [dit.inputs])
    assert torch.equal(run(new, dit.inputs)[0], run(equal, dit.inputs)[0])
    assert new.cost().parameters < equal.cost().parameters


def test_tables_make_up_for_the_mean_at_a_constant_condition(dit: Family) -> None:
    x, time, label = dit.inputs
    constant = [x, time[:1].expand(2).clone(), label[:1].expand(2).clone()]
    pass_ = ShareModulation()
    new, _ = run_passes(
        dit.program, [pass_], [constant], calibration=[constant], recover=False
    )  # fmt: skip
    torch.testing.assert_close(
        run(new, constant)[0], run(dit.program, constant)[0], rtol=1e-4, atol=1e-4
    )
    plan = pass_.plan(dit.program)  # without calibration, tables hold what biases differ by
    for region in pass_.regions(dit.program):
        module = pass_.replace(region, plan.decisions[region.label])
        (layer,) = region.layers
        torch.testing.assert_close(module.shared[0].bias + module.shared[0].table, layer.bias)


def test_a_table_is_the_best_constant(dit: Family) -> None:
    """The mean difference: what is left of the parts has a mean of zero on the calibration."""
    pass_ = ShareModulation()
    evidence = pass_.measure(dit.program, [dit.inputs])
    plan = pass_.plan(dit.program, evidence)
    assert evidence is not None
    for region in pass_.regions(dit.program):
        module = pass_.replace(region, plan.decisions[region.label])
        x = torch.tensor(evidence.regions[region.label][0])
        (layer,) = region.layers
        wanted = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(module.shared[0](x), wanted, rtol=1e-4, atol=1e-4)


def test_image_text_and_single_blocks_share_by_kind_or_all_together() -> None:
    from dataclasses import replace

    from blockwright.ir.capture import capture
    from blockwright.models import flux

    torch.manual_seed(0)
    model = flux.Flux(replace(flux.TOY_FLUX, double_depth=2, single_depth=2)).eval()
    inputs = model.example_inputs(1)
    program = capture(model, inputs)
    by_kind, (step,) = run_passes(program, [ShareModulation()], [list(inputs)])
    assert step.receipt.statistics == {"layers": 6, "shared layers": 3}
    together, (step,) = run_passes(program, [ShareModulation(across="model")], [list(inputs)])
    assert step.receipt.statistics == {"layers": 6, "shared layers": 1}
    names = {name for found in layers_of(together).values() for name in found}
    assert len(names) == 2
    assert together.cost().parameters < by_kind.cost().parameters


def test_narrow_layers_count_for_the_rows_they_have() -> None:
    wide, narrow = torch.tensor([1.0, 2, 3, 4]), torch.tensor([3.0, 4])
    assert torch.equal(mean_rows([wide, narrow]), torch.tensor([2.0, 3, 3, 4]))
    assert torch.equal(mean_rows([wide, wide.clone()]), wide)


def test_training_moves_layers_and_tables_alone(dit: Family) -> None:
    pass_ = ShareModulation(epochs=10, rate=3e-3)
    sets = [dit.inputs, [value.flip(0) for value in dit.inputs]]
    new, (step,) = run_passes(dit.program, [pass_], [dit.inputs], calibration=sets)
    (training,) = step.receipt.trained
    assert training.kept
    assert training.after < training.before
    old = dit.program.tensors
    assert all(t is old[name] for name, t in new.tensors.items() if "shared" not in name)


def test_declines(dit: Family, program: Program, tokens: Tensor) -> None:
    with pytest.raises(NoMatchError, match="it found no modulation"):
        run_passes(program, [ShareModulation()], [[tokens]])
    with pytest.raises(NoMatchError, match="is excluded by pattern"):
        run_passes(dit.program, [ShareModulation(exclude=("*",))], [dit.inputs])
    one, _ = run_passes(dit.program, [DropBlocks(blocks=(1,))], [dit.inputs])
    with pytest.raises(NoMatchError, match="has no other block to share with"):
        run_passes(one, [ShareModulation()], [dit.inputs])
    shared, _ = run_passes(dit.program, [ShareModulation()], [dit.inputs])
    with pytest.raises(NoMatchError, match="is shared already"):
        run_passes(shared, [ShareModulation()], [dit.inputs])
    with pytest.raises(OptionError, match="must average"):
        run_passes(dit.program, [QuantizeWeights(), ShareModulation()], [dit.inputs])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"across": "time"}, "across=time is not supported"),
        ({"epochs": 0}, "epochs=0"),
        ({"rate": 0.0}, "rate=0.0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ShareModulation(**options)
