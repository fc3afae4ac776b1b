"""SceneMaskAttention: the mask of scenes without the mask, and what a text cannot reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.mmdit import JointBlock
from blockwright.passes import SceneMaskAttention
from blockwright.passes.shared.segments import PRESETS, SegmentedAttention, Segments, scene_rows
from blockwright.testing.families import family

DIM, TEXTS, VIDEOS = 8, (1, 3), (4, 6)
RAGGED = {"scenes": 2, "text_lengths": TEXTS, "video_lengths": VIDEOS}


class Joint(nn.Module):
    """Two blocks of attention over text and video."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(JointBlock(DIM, 2, 12) for _ in range(depth))

    def forward(self, video: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            video, text = block(video, text, condition)
        return video, text


def joint(depth: int = 2, texts: int = 4, videos: int = 10) -> tuple[Joint, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Joint(depth).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model, (torch.randn(2, videos, DIM), torch.randn(2, texts, DIM), torch.randn(2, DIM))


@pytest.fixture(scope="module")
def program() -> Program:
    model, inputs = joint()
    return capture(model, inputs, dynamic_shapes=({0: Dim("batch", min=1, max=4)},) * 3)


@pytest.fixture(scope="module")
def shallow() -> Program:
    return capture(*joint(depth=1))


def test_golden(shallow: Program, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(shallow, [SceneMaskAttention(**RAGGED)], [joint()[1]])
    golden("scene_mask_attention", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("scenes", [1, 2, 3, 5])
def test_it_is_attention_under_the_mask_of_its_segments(preset: str, scenes: int) -> None:
    lengths = [*(1 + s % 3 for s in range(scenes)), *(2 + (2 * s) % 5 for s in range(scenes))]
    segments = Segments(lengths, scene_rows(preset, scenes))
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(2, heads, sum(lengths), 4, generator=generator, dtype=torch.float64)
        .requires_grad_() for heads in (4, 2, 2)
    ]  # fmt: skip
    options = {"enable_gqa": True, "scale": 0.7}
    ours = SegmentedAttention(segments, options)(*given)
    theirs = F.scaled_dot_product_attention(*given, attn_mask=segments.mask(), **options)
    torch.testing.assert_close(ours, theirs)
    toward = torch.randn_like(ours)
    mine, wanted = (torch.autograd.grad(y, given, toward) for y in (ours, theirs))
    torch.testing.assert_close(mine, wanted)


def test_presets() -> None:
    assert scene_rows("mask2dit", 2) == ["1010", "0101", "1011", "0111"]
    assert scene_rows("causal", 2) == ["1010", "0101", "1010", "0111"]
    assert scene_rows("diagonal", 2) == ["1010", "0101", "1010", "0101"]
    assert scene_rows("none", 2) == ["1111"] * 4


@pytest.mark.parametrize(
    ("scenes", "density"), [(2, 0.9874), (3, 0.9832), (6, 0.9789), (12, 0.9768)]
)
def test_published_densities(scenes: int, density: float) -> None:
    segments = Segments([226] * scenes + [17_550] * scenes, scene_rows("mask2dit", scenes))
    assert round(segments.density, 4) == density


def test_stretches_that_touch_are_one() -> None:
    segments = Segments([2, 2, 5, 5], scene_rows("mask2dit", 2))
    assert segments.runs() == [
        ((0, 2), [(0, 2), (4, 5)]),
        ((2, 2), [(2, 2), (9, 5)]),
        ((4, 5), [(0, 2), (4, 10)]),
        ((9, 5), [(2, 12)]),
    ]


def test_whole_models(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    new, (step,) = run_passes(program, [SceneMaskAttention(**RAGGED)])
    assert len(step.receipt.changed) == 2
    model, inputs = joint()
    mask = Segments([*TEXTS, *VIDEOS], scene_rows("mask2dit", 2)).mask()
    found = run(new, [x[:1] for x in inputs])
    dense = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x: dense(*x, attn_mask=mask))
    torch.testing.assert_close(
        list(found), list(model(*(x[:1] for x in inputs))), atol=1e-5, rtol=1e-5
    )


def test_within_a_layer_nothing_leaks(shallow: Program) -> None:
    new, _ = run_passes(shallow, [SceneMaskAttention(**RAGGED)])
    inputs = joint()[1]
    parts = [(1, slice(0, 1)), (1, slice(1, None)), (0, slice(0, 4)), (0, slice(4, None))]

    def reached(of: Program, output: int, tokens: slice) -> list[bool]:
        """Whether text_1, text_2, video_1 and video_2 change something."""
        found = []
        for index, part in parts:
            moved = [x.clone() for x in inputs]
            moved[index][:, part] += 1 + torch.arange(DIM)
            before, after = (run(of, list(x))[output][:, tokens] for x in (inputs, moved))
            found.append(not torch.equal(before, after))
        return found

    assert reached(new, 1, slice(0, 1)) == [True, False, True, False]  # text_1
    assert reached(new, 0, slice(4, None)) == [False, True, True, True]  # video_2
    assert reached(shallow, 1, slice(0, 1)) == [True] * 4


def test_scenes_may_change_places(program: Program) -> None:
    video, text, condition = joint()[1]
    new, _ = run_passes(program, [SceneMaskAttention(scenes=2)])
    swap = [x.roll(x.shape[1] // 2, 1) for x in (video, text)]
    ours, theirs = run(new, [*swap, condition]), run(new, [video, text, condition])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.roll(other.shape[1] // 2, 1), atol=1e-5, rtol=1e-5)


def test_one_stream_is_told_its_text() -> None:
    flux = family("flux")
    words = int(flux.program.attentions()[0].streams[0].x_q.meta["val"].shape[-2])
    with pytest.raises(NoMatchError, match="tokens of text and"):
        run_passes(flux.program, [SceneMaskAttention(scenes=words + 1)])
    _, (step,) = run_passes(flux.program, [SceneMaskAttention(scenes=1, rows=("11", "01"))])
    assert len(step.receipt.changed) == 1
    assert "of them known to be text; say text=..." in str(dict(step.receipt.skipped))
    _, (step,) = run_passes(
        flux.program, [SceneMaskAttention(scenes=1, rows=("11", "01"), text=words)]
    )
    assert len(step.receipt.changed) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("joint", {"scenes": 1}, "lets every segment see every segment"),
        ("joint", {"scenes": 2, "mask": "none"}, "lets every segment see every segment"),
        ("joint", {"scenes": 3}, "has 4 tokens of text and 10 others, which are not those of 3"),
        ("joint", RAGGED | {"video_lengths": (4, 4)}, "which are not those of 2 scenes"),
        ("joint", {"scenes": 2, "exclude": ("*",)}, "is excluded by pattern"),
        ("gpt", {"text": 2}, "is masked"),
        ("dit", {}, "0 of them known to be text"),
    ],
)
def test_declines(name: str, options: dict[str, Any], message: str, program: Program) -> None:
    of = program if name == "joint" else family(name).program
    with pytest.raises(NoMatchError, match=message):
        run_passes(of, [SceneMaskAttention(**options)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenes": 0}, "use 1 scene or more"),
        ({"scenes": 2, "text_lengths": (1, 0)}, "lengths of 1 token or more"),
        ({"scenes": 2, "text_lengths": (1,)}, "not as many lengths as scenes=2"),
        ({"scenes": 2, "text_lengths": (1, 2), "text": 4}, "do not add up to text=4"),
        ({"mask": "all"}, "mask=all is not supported"),
        ({"scenes": 1, "rows": ("11", "00")}, "do not say what each of 2 segments sees"),
        ({"scenes": 1, "rows": ("11", "1")}, "do not say what each of 2 segments sees"),
        ({"scenes": 1, "rows": ("11", "2x")}, "do not say what each of 2 segments sees"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SceneMaskAttention(**options)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "inductor"])
def test_engines_reload_and_compute_it(backend: str, tmp_path: Path) -> None:
    model, inputs = joint()
    pass_ = SceneMaskAttention(**RAGGED)
    new, _ = run_passes(capture(model, inputs), [pass_])
    bw.compile(model, [pass_], inputs, backend=backend).save(tmp_path / "engine.bw")
    engine = bw.load(tmp_path / "engine.bw")
    for ours, theirs in zip(engine(*inputs), run(new, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
