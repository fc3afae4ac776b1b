"""Blocks go whole, by influence, index or chance; what is left is the same model, shallower."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.gpt import GPT, GPTConfig
from blockwright.passes import DropBlocks
from blockwright.passes.shared.influence import block_influence, macro_influence
from blockwright.testing.families import FAMILIES, family


@pytest.fixture
def deep() -> GPT:
    """Six blocks, of which the third adds nothing and the fifth little."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=6, ffn_dim=12)).eval()
    with torch.no_grad():
        for index, factor in ((2, 0.0), (4, 0.1)):
            for name, weight in model.blocks[index].named_parameters():
                if "norm" not in name:
                    weight.mul_(factor)
    return model


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [DropBlocks(blocks=(1,))], [[tokens]])
    golden("drop_blocks", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_what_is_left_is_the_model_without_the_blocks(deep: GPT, tokens: Tensor) -> None:
    program = bw.capture(deep, (tokens,))
    new, _ = run_passes(program, [DropBlocks(blocks=(1, -1))], [[tokens]])
    assert list(new.instances) == ["blocks.0", "blocks.2", "blocks.3", "blocks.4"]
    deep.blocks = nn.ModuleList(deep.blocks[i] for i in (0, 2, 3, 4))
    assert torch.equal(run(new, [tokens])[0], deep(tokens))
    assert len({i.block for i in new.instances.values()}) == 1
    assert not [name for name in new.tensors if name.startswith(("blocks.1.", "blocks.5."))]


def test_the_least_influence_goes_first(deep: GPT, tokens: Tensor) -> None:
    program = bw.capture(deep, (tokens,))
    influence = block_influence(program, [[tokens]])
    assert influence["blocks.2.block"] == pytest.approx(0.0, abs=1e-12)
    new, (step,) = run_passes(program, [DropBlocks(keep_ratio=4 / 6)], [[tokens]])
    assert step.receipt.changed == ("blocks.2.block", "blocks.4.block")
    assert len(new.blocks()) == 4


def test_a_block_that_adds_nothing_is_not_missed(deep: GPT, tokens: Tensor) -> None:
    program = bw.capture(deep, (tokens,))
    new, _ = run_passes(program, [DropBlocks(keep_ratio=5 / 6)], [[tokens]])
    assert torch.equal(run(new, [tokens])[0], run(program, [tokens])[0])


def test_macro_influence_is_what_the_end_loses(deep: GPT, tokens: Tensor) -> None:
    program = bw.capture(deep, (tokens,))
    (stack,) = program.stacks()
    found = macro_influence(program, stack, [[tokens], [tokens.flip(0)]])

    def end(model: GPT) -> Tensor:
        seen: list[Tensor] = []
        hook = model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for inputs in (tokens, tokens.flip(0)):
            model(inputs)
        hook.remove()
        return torch.stack(seen).double()

    whole, blocks = end(deep), list(deep.blocks)
    for index, value in enumerate(found.values()):
        deep.blocks = nn.ModuleList(blocks[:index] + blocks[index + 1 :])
        expected = 1 - torch.cosine_similarity(end(deep), whole, dim=-1).mean()
        assert value == pytest.approx(expected.item(), abs=1e-6)


def test_all_of_them_kept_changes_nothing(program: Program, tokens: Tensor) -> None:
    with pytest.raises(NoMatchError, match="drop-blocks changed nothing"):
        run_passes(program, [DropBlocks(keep_ratio=1.0)], [[tokens]])
    new, _ = run_passes(program, [DropBlocks(keep_ratio=1.0, allow_no_match=True)], [[tokens]])
    assert new is program


@pytest.mark.parametrize("seed", range(3))
def test_random_blocks_follow_the_seed(program: Program, tokens: Tensor, seed: int) -> None:
    pass_ = DropBlocks(keep_ratio=0.4, importance="random", seed=seed)
    first, (one,) = run_passes(program, [pass_], [[tokens]])
    _, (two,) = run_passes(program, [pass_], [[tokens]])
    assert one.plan == two.plan
    assert len(first.blocks()) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_without_a_block(name: str) -> None:
    model = family(name)
    blocks = [block.label for block in model.program.blocks()]
    spare = [b for stack in model.program.stacks() if len(stack.blocks) > 1 for b in stack.blocks]
    if not spare:
        with pytest.raises(OptionError, match="would drop all 1 blocks of a stack"):
            run_passes(model.program, [DropBlocks(blocks=(0,))], [model.inputs])
        return
    index = blocks.index(spare[-1].label)
    new, _ = run_passes(model.program, [DropBlocks(blocks=(index,))], [model.inputs])
    assert [block.label for block in new.blocks()] == blocks[:index] + blocks[index + 1 :]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, "is no fraction of blocks"),
        ({"keep_ratio": 1.5}, "is no fraction of blocks"),
        ({"importance": "luck"}, "importance=luck is not supported"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DropBlocks(**options)


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (DropBlocks(keep_ratio=0.1), "keep_ratio=0.1 of 3 blocks keeps none"),
        (DropBlocks(blocks=(0, 1, 2)), "would drop all 3 blocks of a stack"),
        (DropBlocks(blocks=(3,)), "there is no block 3, the model has 3"),
        (DropBlocks(blocks=(0,), exclude=("blocks.0*",)), "cannot drop block 0: it is excluded"),
    ],
)
def test_bad_plans(program: Program, tokens: Tensor, pass_: DropBlocks, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run_passes(program, [pass_], [[tokens]])


def test_influence_needs_finite_inputs(tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Residual(), Residual())
    program = bw.capture(model, (torch.randn(2, 4),))
    with pytest.raises(OptionError, match="NaN or infinity on the calibration inputs"):
        run_passes(
            program, [DropBlocks(keep_ratio=0.5)], [], calibration=[[torch.full((2, 4), torch.nan)]]
        )
    with pytest.raises(OptionError, match="measured on calibration inputs, and there are none"):
        run_passes(program, [DropBlocks(keep_ratio=0.5)], [], calibration=[])


class Residual(nn.Module):
    """A feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))
