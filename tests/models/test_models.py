"""The zoo: published sizes, sane outputs, and programs that run like the modules."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from blockwright.driver.compile import compile
from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.ir.verify import verify
from blockwright.models import (
    algoformer,
    bert,
    dit,
    dit3d,
    flux,
    gpt,
    lego,
    llama,
    memoryformer,
    mmdit,
    pixart,
    pt_dit,
    qwen_image,
    sd3,
    styleswin,
    swin,
    vit,
    wan,
    widenet,
)

PUBLISHED = [
    (gpt.GPT, gpt.GPT2_SMALL, 124_439_808),
    (gpt.GPT, gpt.GPT2_MEDIUM, 354_823_168),
    (gpt.GPT, gpt.GPT2_LARGE, 774_030_080),
    (gpt.GPT, gpt.GPT2_XL, 1_557_611_200),
    (llama.Llama, llama.LLAMA_2_7B, 6_738_415_616),
    (llama.Llama, llama.LLAMA_3_1_8B, 8_030_261_248),
    (llama.Llama, llama.QWEN3_0_6B, 596_049_920),
    (llama.Llama, llama.QWEN3_8B, 8_190_735_360),
    (bert.Bert, bert.BERT_BASE, 109_482_240),
    (bert.Bert, bert.BERT_LARGE, 335_141_888),
    (bert.Bert, bert.MINILM_L6, 22_713_216),
    (vit.ViT, vit.VIT_TI16, 5_717_416),
    (vit.ViT, vit.VIT_B16, 86_567_656),
    (vit.ViT, vit.VIT_L16, 304_326_632),
    (vit.ViT, vit.DEIT_S16, 22_050_664),
    (swin.Swin, swin.SWIN_T, 28_288_354),
    (swin.Swin, swin.SWIN_S, 49_606_258),
    (swin.Swin, swin.SWIN_B, 87_768_224),
    (dit.DiT, dit.DIT_S2, 32_865_056),
    (dit.DiT, dit.DIT_B2, 130_315_808),
    (dit.DiT, dit.DIT_L2, 457_840_672),
    (dit.DiT, dit.DIT_XL2, 674_834_720),
    (flux.Flux, flux.FLUX_1_DEV, 11_901_408_320),
    (flux.Flux, flux.FLUX_1_SCHNELL, 11_891_178_560),
    (sd3.SD3, sd3.SD3_MEDIUM, 2_028_328_000),
    (pixart.PixArt, pixart.PIXART_ALPHA_1024, 611_349_152),
    (pixart.PixArt, pixart.PIXART_ALPHA_512, 610_856_096),
    (qwen_image.QwenImage, qwen_image.QWEN_IMAGE, 20_430_401_088),
    (wan.Wan, wan.WAN_2_1_1_3B, 1_418_996_800),
    (wan.Wan, wan.WAN_2_1_14B, 14_288_491_584),
    (widenet.WideViT, widenet.WIDENET_B, 29_690_600),
    (widenet.WideViT, widenet.WIDENET_L, 40_941_544),
    (widenet.WideViT, widenet.WIDENET_H, 63_341_800),
    (algoformer.AlgoFormer, algoformer.ALGOFORMER, 3 * 789_760 + 27_393),
    # Not published as a whole: tables as published, and two embeddings of 50,304 tokens.
    (memoryformer.MemoryFormer, memoryformer.MEMORYFORMER_TINY, 466_777_856),
    (lego.Lego, lego.S_PG_64, 33_750_360 - 396_288),  # without positions, as below
    (lego.Lego, lego.XL_U_32, 1_261_977_392 - 603_648),
    (dit3d.DiT3D, dit3d.DIT3D_S4, 32_610_624),
    (dit3d.DiT3D, dit3d.DIT3D_B4, 129_806_784),
    (dit3d.DiT3D, dit3d.DIT3D_L4, 578_450_496),
    (dit3d.DiT3D, dit3d.DIT3D_XL4, 674_071_104),
    (pt_dit.PTDiT, pt_dit.PT_DIT_L, 637_698_544),
    (styleswin.StyleSwin, styleswin.STYLESWIN_256, 48_929_491),
    (styleswin.StyleSwin, styleswin.STYLESWIN_1024, 40_862_963),
]


def count(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(("architecture", "config", "parameters"), PUBLISHED)
def test_sizes_are_the_published_ones(architecture: Any, config: Any, parameters: int) -> None:
    with torch.device("meta"):
        assert count(architecture(config).parameters()) == parameters


def test_fixed_tables_are_buffers() -> None:
    with torch.device("meta"):
        assert count(lego.Lego(lego.S_PG_64).buffers()) == 396_288
        assert count(lego.Lego(lego.XL_U_32).buffers()) == 603_648
        assert count(swin.Swin(swin.SWIN_T).buffers()) == 249_704
        assert count(dit.DiT(dit.DIT_XL2).buffers()) == 675_129_632 - 674_834_720
        assert count(sd3.SD3(sd3.SD3_MEDIUM).buffers()) == 56_623_104


@pytest.mark.parametrize(
    ("architecture", "config", "billions"),
    [
        (vit.ViT, vit.VIT_B16, 17.56),
        (vit.ViT, vit.DEIT_S16, 4.60),
        (swin.Swin, swin.SWIN_T, 4.5),
        (dit.DiT, dit.DIT_S2, 6.06),
    ],
)
def test_multiply_adds_are_the_published_ones(
    architecture: Any, config: Any, billions: float
) -> None:
    with torch.device("meta"):
        model = architecture(config).eval()
        inputs = model.example_inputs()  # two samples, two FLOPs per multiply-add
    flops = capture(model, inputs).cost().flops
    assert flops / 4e9 == pytest.approx(billions, rel=0.01)


@dataclass(frozen=True)
class Toy:
    """A small model, the shapes it returns for a batch of 2, and the blocks it folds into.

    `folds` holds the instances of each class of blocks. `unread` matches parameters that change no
    output.
    """

    architecture: Any
    config: Any
    shapes: tuple[tuple[int, ...], ...]
    folds: tuple[int, ...]
    unread: str = "$"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = self.architecture(self.config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)  # no gate and no bias stays zero
        return model


STACK = ("blocks.0", "blocks.1", "blocks.2")
TOYS = {
    "gpt": Toy(gpt.GPT, gpt.TOY, ((2, 16, 32),), (3,)),
    "llama": Toy(llama.Llama, llama.TOY, ((2, 16, 32),), (3,)),
    "bert": Toy(bert.Bert, bert.TOY, ((2, 16, 8), (2, 8)), (3,)),
    "vit": Toy(vit.ViT, vit.TOY, ((2, 5),), (3,)),
    # The last stage is two pairs of a straight and a shifted block; the first a single pair.
    "swin": Toy(swin.Swin, swin.TOY, ((2, 5),), (2,)),
    "dit": Toy(dit.DiT, dit.TOY, ((2, 8, 8, 8),), (3,)),
    "flux": Toy(flux.Flux, flux.TOY_FLUX, ((2, 12, 4),), (3, 3)),
    # The last block ends the text and is unlike the three before it.
    "sd3": Toy(sd3.SD3, sd3.TOY_SD3, ((2, 4, 8, 8),), (3,)),
    "pixart": Toy(pixart.PixArt, pixart.TOY, ((2, 8, 8, 8),), (3,)),
    # What the last block makes of the text is lost.
    "qwen-image": Toy(qwen_image.QwenImage, qwen_image.TOY, ((2, 4, 6, 8),), (2,),
                      r"blocks\.2\.text\.(out|up|down)\."),
    "wan": Toy(wan.Wan, wan.TOY, ((2, 4, 2, 4, 6),), (3,)),
    "widenet": Toy(widenet.WideViT, widenet.TOY, ((2, 5),), (3,)),
    "wide-gpt": Toy(widenet.WideGPT, widenet.TOY_GPT, ((2, 16, 32),), (3,)),
    # Only the turns of the loop follow upon each other with nothing between.
    "algoformer": Toy(algoformer.AlgoFormer, algoformer.TOY, ((2, 16, 2),), (3,)),
    "memoryformer": Toy(memoryformer.MemoryFormer, memoryformer.TOY, ((2, 16, 32),), (3,)),
    "lego": Toy(lego.Lego, lego.TOY, ((2, 4, 8, 8),), (2, 2)),
    "dit3d": Toy(dit3d.DiT3D, dit3d.TOY, ((2, 3, 64),), (2,)),
    "pt-dit": Toy(pt_dit.PTDiT, pt_dit.TOY, ((2, 4, 1, 8, 8),), (2,)),
    "styleswin": Toy(styleswin.StyleSwin, styleswin.TOY, ((2, 3, 8, 8),), (2, 2)),
}  # fmt: skip
PATHS = {
    **dict.fromkeys(("gpt", "llama", "bert", "vit", "dit", "sd3", "pixart", "wan"), STACK),
    "qwen-image": STACK[:2],
    # What all blocks share lies outside of each.
    **dict.fromkeys(("widenet", "wide-gpt"), ("stack", "stack#1", "stack#2")),
    "memoryformer": STACK,
    "algoformer": ("loop.0", "loop.0#1", "loop.0#2"),
    "lego": tuple(f"bricks.{k}.blocks.{i}" for k in (0, 1) for i in (0, 1)),
    "flux": (*(f"double_{path}" for path in STACK), *(f"single_{path}" for path in STACK)),
}


@pytest.fixture(scope="module", params=list(TOYS))
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def model(name: str) -> nn.Module:
    return TOYS[name].build()


@pytest.fixture(scope="module")
def captured(model: Any) -> Program:
    """The toy's program, batch dynamic."""
    inputs, batch = model.example_inputs(), Dim("batch", min=1, max=8)
    names = inspect.signature(model.forward).parameters
    return capture(
        model,
        inputs,
        dynamic_shapes={
            name: {0: batch} if is_batched(value) else None
            for name, value in zip(names, inputs, strict=False)
        },
    )


def is_batched(value: Tensor) -> bool:
    return value.shape[0] == 2  # an example batch; FLUX's places have none


def tensors(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def test_outputs_are_finite_and_depend_on_every_input(name: str, model: Any) -> None:
    inputs = [
        x.clone().requires_grad_() if x.is_floating_point() else x for x in model.example_inputs()
    ]
    outputs = tensors(model(*inputs))
    assert tuple(tuple(y.shape) for y in outputs) == TOYS[name].shapes
    assert all(y.isfinite().all() for y in outputs)
    torch.stack([y.square().sum() for y in outputs]).sum().backward()
    moving = [x for x in inputs if x.requires_grad] + [
        p for path, p in model.named_parameters() if not re.match(TOYS[name].unread, path)
    ]
    assert all(x.grad is not None and x.grad.isfinite().all() for x in moving)
    assert all(x.grad.any() for x in inputs if x.requires_grad)


def test_program_runs_like_the_module(model: Any, captured: Program) -> None:
    verify(captured)
    for batch in (1, 3):
        inputs = [
            torch.cat((x, x.flip(0)))[:batch] if is_batched(x) else x
            for x in model.example_inputs()
        ]
        result = captured.signature.pack(run(captured, captured.signature.bind(inputs, {})))
        expected = tensors(model(*inputs))
        for ours, theirs in zip(tensors(result), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_repeated_blocks_fold(name: str, captured: Program) -> None:
    stacks = Counter(i.block for i in captured.instances.values() if i.weights)
    assert tuple(stacks.values()) == TOYS[name].folds


def test_blocks_keep_their_module_paths(name: str, captured: Program) -> None:
    if name not in PATHS:
        pytest.skip("pairs of blocks are not modules")
    assert tuple(k for k, i in captured.instances.items() if i.weights) == PATHS[name]


@pytest.mark.parametrize(
    ("kind", "attentions", "norms"),
    [
        ("pixart", 6, 7),
        ("qwen-image", 3, 25),  # heads have norms too; the last of the text does nothing
        ("wan", 6, 22),
    ],
)
def test_attentions_and_norms_are_recognised(kind: str, attentions: int, norms: int) -> None:
    model: Any = TOYS[kind].build()
    program = capture(model, model.example_inputs())
    assert (len(program.attentions()), len(program.norms())) == (attentions, norms)


SHALLOW = {
    "flux": {"double_depth": 1, "single_depth": 1}, "sd3": {"depth": 2}, "swin": {"depths": (1, 2)},
}  # fmt: skip
QUICK = {"gpt", "pixart", "qwen-image", "wan"}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in TOYS]
)
def test_onnxruntime_computes_what_the_module_does(kind: str) -> None:
    config = replace(TOYS[kind].config, **SHALLOW.get(kind, {"depth": 1}))
    model: Any = replace(TOYS[kind], config=config).build()
    inputs = model.example_inputs()
    engine = compile(model, (), inputs, backend="onnxruntime")
    with torch.no_grad():
        expected = tensors(model(*inputs))
    for ours, theirs in zip(tensors(engine(*inputs)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bert_does_not_look_at_padding() -> None:
    model = TOYS["bert"].build()
    tokens, types, mask = bert.Bert(bert.TOY).example_inputs()
    assert not mask.all()
    features, _ = model(tokens, types, mask)
    changed, _ = model(torch.where(mask, tokens, 0), types, mask)
    assert torch.equal(features[mask], changed[mask])


def test_decoders_do_not_look_ahead() -> None:
    for name in ("gpt", "llama"):
        model = TOYS[name].build()
        (tokens,) = TOYS[name].architecture(TOYS[name].config).example_inputs()
        torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5])


def test_shifted_windows_reach_beyond_straight_ones() -> None:
    """After two blocks a patch has seen its neighbours in other windows, but not all patches."""
    torch.manual_seed(0)
    straight, shifted = (swin.Block(4, 8, 1, side=8, window=2, shift=s) for s in (0, 1))
    x = torch.zeros(1, 8, 8, 4, requires_grad=True)
    shifted(straight(x + torch.randn(1, 8, 8, 4)))[0, 3, 3].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(-1) > 0
    assert seen[2:6, 2:6].all()
    assert seen.sum() == 16


def test_a_fresh_dit_block_passes_its_input_on() -> None:
    block, x = dit.Block(dit.TOY), torch.randn(2, 16, 8)
    assert torch.equal(block(x, torch.randn(2, 8)), x)


def test_flux_turns_heads_by_differences_of_places() -> None:
    """Rotation keeps lengths, and the product of two heads depends on their distance alone."""
    places = torch.tensor([[0.0, 1, 2], [0, 3, 1], [0, 4, 5], [0, 6, 4]])
    x = torch.randn(1, 1, 1, 8).expand(1, 1, 4, 8)
    turned = mmdit.rotate(x, flux.rotations(places, (2, 2, 4), 100.0))[0, 0]
    torch.testing.assert_close(turned.norm(dim=-1), x[0, 0].norm(dim=-1))
    torch.testing.assert_close(turned[0] @ turned[1], turned[2] @ turned[3])


def test_wan_turns_heads_by_differences_of_places() -> None:
    grid = torch.Size((2, 3, 4))
    rotary = wan.rotations(grid, 20, 100.0, torch.device("cpu"))
    x = torch.randn(20, generator=torch.Generator().manual_seed(0)).expand(1, 1, 24, 20)
    turned = wan.rotate(x, rotary)[0, 0].reshape(*grid, 20)
    one, other = turned[0, 0, 1] @ turned[1, 1, 3], turned[0, 1, 0] @ turned[1, 2, 2]
    torch.testing.assert_close(one, other)
    assert not torch.isclose(one, turned[0, 0, 1] @ turned[1, 1, 2])


def test_qwen_image_does_not_look_at_padding() -> None:
    model = TOYS["qwen-image"].build()
    x, text, mask, time = qwen_image.QwenImage(qwen_image.TOY).example_inputs()
    assert not mask.all()
    changed = torch.where(mask[..., None], text, 7.0)
    torch.testing.assert_close(model(x, text, mask, time), model(x, changed, mask, time))


def test_llama_stretch_slows_slow_rotations_only() -> None:
    config = llama.LLAMA_3_1_8B
    plain = llama.LlamaConfig(theta=config.theta)
    device = torch.device("cpu")
    slowed = llama.frequencies(plain, device) / llama.frequencies(config, device)
    assert slowed[0] == 1
    assert math.isclose(slowed[-1], 8.0, rel_tol=1e-6)
    assert (slowed.diff() >= -1e-5).all()
