"""The middle of a stack becomes a loop over few blocks."""

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
from blockwright.passes import LoopBlocks
from blockwright.testing.families import family


@pytest.fixture(scope="module")
def deep() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=6, ffn_dim=12)).eval()


@pytest.fixture(scope="module")
def program(deep: GPT) -> Program:
    return bw.capture(deep, (torch.arange(16).reshape(2, 8),))


def looped(deep: GPT, order: list[int]) -> GPT:
    """Return the model that runs the given blocks in the given order."""
    copy = GPT(deep.config).eval()
    copy.load_state_dict(deep.state_dict())
    copy.blocks = nn.ModuleList(copy.blocks[index] for index in order)
    return copy


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [LoopBlocks(before=2, turns=4)], [[tokens]])
    golden("loop_blocks", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize(
    ("pass_", "order"),
    [
        (LoopBlocks(start="first"), [0, 1, 1, 1, 1, 5]),
        (LoopBlocks(start="middle"), [0, 2, 2, 2, 2, 5]),
        (LoopBlocks(start="first", turns=2), [0, 1, 1, 5]),
        (LoopBlocks(start="first", turns=6), [0, *[1] * 6, 5]),
        (LoopBlocks(start="first", body=2), [0, 1, 2, 1, 2, 5]),
        (LoopBlocks(start="first", body=2, turns=3), [0, 1, 2, 1, 2, 1, 2, 5]),
        (LoopBlocks(start="first", body=3, before=0, after=0), [0, 1, 2, 0, 1, 2]),
        (LoopBlocks(start="first", body=3, before=0), [0, 1, 2, 5]),
    ],
)
def test_it_is_the_model_with_a_loop(
    deep: GPT, program: Program, tokens: Tensor, pass_: LoopBlocks, order: list[int]
) -> None:
    new, _ = run_passes(program, [pass_], [[tokens]])
    assert torch.equal(run(new, [tokens])[0], looped(deep, order)(tokens))
    kept = {f"blocks.{index}" for index in order}
    owners = {".".join(name.split(".")[:2]) for name in new.tensors if name.startswith("blocks.")}
    assert owners == kept


def test_the_mean_of_equal_blocks_changes_no_bit(deep: GPT, tokens: Tensor) -> None:
    same = GPT(deep.config).eval()
    for index in range(2, 5):
        same.blocks[index].load_state_dict(same.blocks[1].state_dict())
    program = bw.capture(same, (tokens,))
    new, _ = run_passes(program, [LoopBlocks()], [[tokens]])
    assert torch.equal(run(new, [tokens])[0], same(tokens))
    assert new.cost().parameters < program.cost().parameters


def test_weights_do_not_depend_on_the_turns(program: Program, tokens: Tensor) -> None:
    names = [
        set(run_passes(program, [LoopBlocks(turns=turns)], [[tokens]])[0].tensors)
        for turns in (1, 4, 9)
    ]
    assert names[0] == names[1] == names[2]


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "dit"])
def test_other_families(name: str) -> None:
    model = family(name)
    new, _ = run_passes(model.program, [LoopBlocks(before=0, after=0)], [model.inputs])
    assert new.cost().parameters < model.program.cost().parameters
    assert new.cost().flops == model.program.cost().flops


def test_no_loop_no_change(program: Program, tokens: Tensor) -> None:
    pass_ = LoopBlocks(before=2, body=2, after=2)
    assert (
        "is one of 2 blocks, no more than the body of the loop"
        in pass_.plan(program).skips.values()
    )
    with pytest.raises(NoMatchError, match="it skipped all 6"):
        run_passes(program, [pass_], [[tokens]])


class Odd(nn.Module):
    """Two feed-forward blocks of different width."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(4, width) for width in (8, 6))
        self.downs = nn.ModuleList(nn.Linear(width, 4) for width in (8, 6))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(nn.functional.gelu(up(norm(x))))
        return x


class Sided(nn.Module):
    """Blocks of one build, every second of which reads another condition."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(4))
        self.ups = nn.ModuleList(nn.Linear(4, 8) for _ in range(4))
        self.downs = nn.ModuleList(nn.Linear(8, 4) for _ in range(4))

    def forward(self, x: Tensor, one: Tensor, two: Tensor) -> Tensor:
        for i in range(4):
            gate = self.scales[i]((one, two)[i % 2])
            h = self.norms[i](x)
            x = x + gate * self.downs[i](nn.functional.gelu(self.ups[i](h)))
        return x


def test_what_differs_between_turns_is_refused() -> None:
    x = torch.randn(2, 3, 4)
    odd = bw.capture(Odd(), (x,))
    with pytest.raises(NoMatchError, match="is not built like"):
        run_passes(odd, [LoopBlocks(before=0, after=0)], [[x]])
    sided = bw.capture(Sided(), (x, x + 1, x + 2))
    with pytest.raises(NoMatchError, match="reads other values than"):
        run_passes(sided, [LoopBlocks(before=0, after=0)], [[x, x, x]])
    both, _ = run_passes(sided, [LoopBlocks(before=0, after=0, body=2)], [[x, x, x]])
    assert len(both.blocks()) == 4


@pytest.mark.parametrize("options", [{"before": -1}, {"body": 0}, {"turns": 0}, {"rate": 0.0}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="loop over one block or more"):
        LoopBlocks(**options)


def test_a_bad_start() -> None:
    with pytest.raises(OptionError, match="start=last is not supported"):
        LoopBlocks(start="last")
