"""Text that is no longer computed: what replaces it, what goes with it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.flux import TOY_FLUX, Flux
from blockwright.models.mmdit import JointBlock
from blockwright.models.qwen_image import TOY, QwenImage
from blockwright.passes import LinearizeStreams

Sets = list[list[Tensor]]
GROUP = ("blocks.0", "blocks.2")


class Joint(nn.Module):
    """Joint blocks, both streams of which are returned."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(JointBlock(8, 2, 12) for _ in range(depth))

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            image, text = block(image, text, condition)
        return image, text


@pytest.fixture(scope="module")
def joint() -> tuple[Program, Sets]:
    torch.manual_seed(0)
    model = Joint(4).eval()
    sets = [[torch.randn(2, 6, 8), torch.randn(2, 5, 8), torch.randn(2, 8)] for _ in range(6)]
    return bw.capture(model, tuple(sets[0])), sets


def test_golden(joint: tuple[Program, Sets], golden: Callable[[str, str], None]) -> None:
    program, sets = joint
    pass_ = LinearizeStreams(groups=(("blocks.0", "blocks.1"),))
    new, (step,) = run_passes(program, [pass_], sets[:1])
    golden("linearize_streams", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_the_text_of_a_group_goes(joint: tuple[Program, Sets]) -> None:
    program, sets = joint
    new, (step,) = run_passes(program, [LinearizeStreams(groups=(GROUP,))], sets[:1])
    for index in (1, 2):
        left = {n for n in new.tensors if n.startswith(f"blocks.{index}.text.")}
        assert left == {f"blocks.{index}.text.qkv.{leaf}" for leaf in ("weight", "bias")}
    maps = {name for name in new.tensors if name not in program.tensors}
    assert {name.rpartition(".")[0] for name in maps} == {
        "blocks.1.stream_map", "blocks.2.stream_map", "blocks.2.stream_end"
    }  # fmt: skip
    image = {name for name in program.tensors if ".image." in name}
    assert image < set(new.tensors)
    assert step.receipt.changed == ("blocks.0..blocks.2",)


def test_it_computes_what_it_says(joint: tuple[Program, Sets]) -> None:
    """Block by block, by the model's own layers."""
    program, sets = joint
    new, _ = run_passes(program, [LinearizeStreams(groups=(GROUP,))], calibration=sets)
    weights, (image, text, condition) = new.tensors, sets[0]
    torch.manual_seed(0)
    blocks = Joint(4).eval().blocks

    def mapped(x: Tensor, name: str) -> Tensor:
        return x + x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    with torch.no_grad():
        shift, scale, *_ = blocks[0].text.modulate(condition)
        read = blocks[0].text.attention_norm(text) * (1 + scale) + shift
        image, text = blocks[0](image, text, condition)
        for index in (1, 2):
            block = blocks[index]
            block.text.attention_norm = nn.Identity()
            block.text.modulate = lambda _: (0.0,) * 6
            image, _ = block(image, mapped(read, f"blocks.{index}.stream_map"), condition)
        text = mapped(text, "blocks.2.stream_end")
        expected = blocks[3](image, text, condition)
    for ours, theirs in zip(run(new, sets[0]), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_least_squares_come_closer_than_nothing(joint: tuple[Program, Sets]) -> None:
    program, sets = joint
    pass_ = LinearizeStreams(groups=(GROUP,))
    zero, _ = run_passes(program, [pass_])
    new, (step,) = run_passes(program, [pass_], calibration=sets)
    truth = torch.cat(run(program, sets[0]), dim=1)
    far, near = ((torch.cat(run(p, sets[0]), dim=1) - truth).norm() for p in (zero, new))
    assert near < far
    assert step.receipt.trained[0].after <= step.receipt.trained[0].before


@pytest.mark.parametrize(
    ("model", "group", "idle"),
    [
        (lambda: Flux(TOY_FLUX), ("double_blocks.0", "double_blocks.2"), ()),
        (lambda: QwenImage(TOY), ("blocks.0", "blocks.1"), ()),
    ],
    ids=["flux", "qwen-image"],
)
def test_whole_models(model: Any, group: tuple[str, str], idle: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    made = model().eval()
    inputs = list(made.example_inputs())
    program = bw.capture(made, tuple(inputs))
    new, _ = run_passes(program, [LinearizeStreams(groups=(group,))], calibration=[inputs])
    assert len(new.attentions()) == len(program.attentions())
    assert len(new.feed_forwards()) < len(program.feed_forwards())
    assert all(bool(y.isfinite().all()) for y in run(new, inputs))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((("blocks.0", "blocks.9"),), "there is no block 'blocks.9'"),
        ((("blocks.1", "blocks.1"),), "has no second block"),
        ((("blocks.2", "blocks.1"),), "has no second block"),
        ((("blocks.0", "blocks.1"), ("blocks.1", "blocks.2")), "or another's"),
    ],
)
def test_bad_groups(
    joint: tuple[Program, Sets], groups: tuple[tuple[str, str], ...], message: str
) -> None:
    program, sets = joint
    with pytest.raises(OptionError, match=message):
        run_passes(program, [LinearizeStreams(groups=groups)], sets[:1])


def test_one_stream_is_no_group(program: Program, tokens: Tensor) -> None:
    with pytest.raises(OptionError, match="whose attention reads no stream 0 apart"):
        run_passes(program, [LinearizeStreams(groups=(GROUP,))], [[tokens]])


def test_what_stands_between_is_refused() -> None:
    class Between(Joint):
        def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
            for index, block in enumerate(self.blocks):
                image, text = block(image, text, condition)
                image = image.sin().cumsum(1) if index == 1 else image
            return image, text

    torch.manual_seed(0)
    inputs = (torch.randn(2, 6, 8), torch.randn(2, 5, 8), torch.randn(2, 8))
    program = bw.capture(Between(4).eval(), inputs)
    assert [block.instance for block in program.blocks()] == [f"blocks.{i}" for i in range(4)]
    with pytest.raises(OptionError, match="something is computed between its blocks"):
        run_passes(program, [LinearizeStreams(groups=(GROUP,))])


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="stream=-1"):
        LinearizeStreams(groups=(), stream=-1)
