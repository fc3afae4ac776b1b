"""WindowAttention: the windows of a mask that is never made, whatever the grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models import dit
from blockwright.passes import WindowAttention
from blockwright.passes.shared.windows import HeadGroup, WindowedAttention, WindowPlan, fits_heads
from blockwright.testing.families import Family, family


@pytest.fixture(scope="module")
def small() -> Family:
    return family("dit")  # 4 x 4 patches


def test_golden(small: Family, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(small.program, [WindowAttention(window=(2,))], [small.inputs])
    golden("window_attention", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def allowed(plan: WindowPlan, group: HeadGroup) -> Tensor:
    """Return which token sees which, from where the borders of the windows are."""
    places = torch.cartesian_prod(*map(torch.arange, plan.grid)).reshape(-1, len(plan.grid))
    number = (places - torch.tensor(group.shift)).div(
        torch.tensor(group.window), rounding_mode="floor"
    )
    inside = (number[:, None] == number).all(-1)
    return F.pad(inside, (plan.prefix, plan.suffix, plan.prefix, plan.suffix), value=True)


def dense(plan: WindowPlan, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attend under a mask of all tokens by all tokens."""
    masks = [allowed(plan, g).expand(g.heads, -1, -1) for g in plan.groups]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.cat(masks), **options)


def draw(plan: WindowPlan, heads: int, kv_heads: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    seq = math.prod(plan.grid) + plan.prefix + plan.suffix
    return [
        torch.randn(batch, count, seq, 4, generator=generator, dtype=torch.float64)
        for count in (heads, kv_heads, kv_heads)
    ]


CASES = {
    "straight": WindowPlan([4, 6], [HeadGroup(2, [2, 3], [0, 0])]),
    "shifted": WindowPlan([8, 8], [HeadGroup(2, [4, 4], [2, 2])]),
    "double": WindowPlan([6, 6], [HeadGroup(1, [3, 3], [0, 0]), HeadGroup(1, [3, 3], [1, 1])]),
    "uneven heads": WindowPlan([4, 4], [
        HeadGroup(3, [2, 4], [1, 0]), HeadGroup(2, [3, 2], [1, 1])
    ]),
    "padded": WindowPlan([5, 7], [HeadGroup(2, [3, 4], [0, 0])]),
    "padded and shifted": WindowPlan([5, 7], [HeadGroup(2, [3, 4], [1, 2])]),
    "one axis": WindowPlan([9], [HeadGroup(2, [4], [2])]),
    "three axes": WindowPlan([4, 6, 5], [HeadGroup(2, [2, 4, 5], [1, 2, 0])]),
    "class token": WindowPlan([4, 4], [HeadGroup(2, [3, 3], [1, 1])], prefix=1),
    "text behind": WindowPlan([4, 4], [HeadGroup(2, [2, 2], [0, 0])], prefix=1, suffix=3),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_attention_under_the_mask_of_its_windows(name: str) -> None:
    plan = CASES[name]
    heads = sum(group.heads for group in plan.groups)
    given = [x.requires_grad_() for x in draw(plan, heads, heads)]
    ours, theirs = WindowedAttention(plan, heads, heads)(*given), dense(plan, *given)
    torch.testing.assert_close(ours, theirs)
    toward = torch.randn_like(ours)
    mine, wanted = (torch.autograd.grad(y, given, toward) for y in (ours, theirs))
    torch.testing.assert_close(mine, wanted)


def test_heads_may_share_keys_and_scores_their_scale() -> None:
    groups = [HeadGroup(2, [2, 2], [0, 0]), HeadGroup(2, [2, 2], [1, 1])]
    plan = WindowPlan([4, 4], groups, prefix=1)
    given = draw(plan, 4, 2)
    options = {"enable_gqa": True, "scale": 0.3}
    ours = WindowedAttention(plan, 4, 2, options)(*given)
    torch.testing.assert_close(ours, dense(plan, *given, **options))
    assert not fits_heads([1, 3], 4, 2)


def test_a_window_of_the_whole_grid_is_dense_attention() -> None:
    plan = WindowPlan([3, 4], [HeadGroup(2, [3, 4], [0, 0])])
    given = draw(plan, 2, 2)
    ours = WindowedAttention(plan, 2, 2)(*given)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(*given))


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_samples_do_not_meet(batch: int) -> None:
    plan = CASES["three axes"]
    given = draw(plan, 2, 2, batch)
    whole = WindowedAttention(plan, 2, 2)
    alone = [whole(*(x[i : i + 1] for x in given)) for i in range(batch)]
    torch.testing.assert_close(whole(*given), torch.cat(alone))


@pytest.mark.parametrize("what", ["within", "windows", "translated"])
def test_windows_do_not_know_where_they_are(what: str) -> None:
    plan = WindowPlan([4, 4], [HeadGroup(2, [2, 2], [0, 0])])
    cells = torch.arange(16).view(4, 4)
    order = {
        "within": torch.cat([cells[:1].flip(1).roll(2, 1), cells[1:]]),  # two swap places
        "windows": torch.cat([cells[2:], cells[:2]]),
        "translated": cells.roll(2, 1),
    }[what].flatten()
    given = draw(plan, 2, 2)
    core = WindowedAttention(plan, 2, 2)
    moved = core(*(x[:, :, order] for x in given))
    torch.testing.assert_close(moved, core(*given)[:, :, order])


def without_windows(model: dit.DiT, plans: Sequence[WindowPlan]) -> None:
    """Make the blocks of a model attend as planned, under a mask."""
    for block, plan in zip(model.blocks, plans, strict=True):
        attention = block.attention

        def forward(x: Tensor, attention: Any = attention, plan: WindowPlan = plan) -> Tensor:
            qkv = attention.qkv(x).unflatten(-1, (3, attention.heads, -1))
            y = dense(plan, *qkv.transpose(1, 3).unbind(2))
            return attention.out(y.transpose(1, 2).flatten(2))

        attention.forward = forward


STRAIGHT, SHIFTED = [0, 0], [1, 1]


@pytest.mark.parametrize(
    ("options", "window", "shifts"),
    [
        ({"shift": "double"}, [3, 3], [[STRAIGHT, SHIFTED]] * 2),
        pytest.param(
            {"shift": "alternate"}, [3, 3], [[STRAIGHT] * 2, [SHIFTED] * 2], marks=pytest.mark.slow
        ),
        pytest.param(
            {"shift": "all", "grid": (2, 2, 4), "window": (2, 1, 2)}, [2, 1, 2],
            [[[0, 0, 1]] * 2] * 2, marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_whole_models(options: dict[str, Any], window: list[int], shifts: list[Any]) -> None:
    torch.manual_seed(0)
    model = dit.DiT(replace(dit.TOY, depth=2)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = model.example_inputs()
    program = capture(model, inputs, dynamic_shapes=({0: Dim("batch", min=1, max=4)},) * 3)
    new, _ = run_passes(program, [WindowAttention(**{"window": (3,), **options})])
    grid = list(options.get("grid", (4, 4)))
    without_windows(
        model, [WindowPlan(grid, [HeadGroup(1, window, s) for s in both]) for both in shifts]
    )
    for batch in (2, 3):
        inputs = model.example_inputs(batch)
        torch.testing.assert_close(run(new, inputs)[0], model(*inputs), atol=1e-5, rtol=1e-5)


def test_layers_are_chosen_and_counted(small: Family) -> None:
    new, (step,) = run_passes(
        small.program, [WindowAttention(window=(2,), every=2, shift="double")], [small.inputs]
    )
    assert list(step.receipt.changed) == ["blocks.0.attention"]
    assert step.receipt.statistics["with shifted windows"] == 1
    assert new.cost().by_kind["attention"] < small.program.cost().by_kind["attention"]


def test_class_tokens_stay_global() -> None:
    vit = family("vit")
    tokens = int(vit.program.attentions()[0].core.meta["val"].shape[-2])
    side = math.isqrt(tokens - 1)
    pass_ = WindowAttention(window=(side // 2,), prefix=1)
    new, (step,) = run_passes(vit.program, [pass_], [vit.inputs])
    assert len(step.receipt.changed) == 2
    assert not torch.isnan(run(new, vit.inputs)[0]).any()
    with pytest.raises(NoMatchError, match=f"has {tokens} tokens, no square of them; give a grid"):
        run_passes(vit.program, [WindowAttention(window=(2,))])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dit", {}, "has one window for its whole grid"),
        ("dit", {"window": (2,), "grid": (3, 5)}, "has 16 tokens, and not the 3 x 5 of the grid"),
        ("dit", {"window": (2,), "prefix": 1}, "no square of them and 1 more"),
        ("dit", {"window": (2,), "exclude": ("*",)}, "is excluded by pattern"),
        ("gpt", {"window": (2,)}, r"is masked \(causal\)"),
        ("bert", {"window": (2,)}, r"is masked \(padding\)"),
        ("swin", {"window": (1,)}, r"is masked \(bias\)"),
        ("spelled", {"window": (2,)}, "is spelled out in a way"),
    ],
)
def test_declines(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NoMatchError, match=message):
        run_passes(family(name).program, [WindowAttention(**options)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (0,)}, "give sides of 1 or more"),
        ({"window": ()}, "give sides of 1 or more"),
        ({"every": 0}, "give sides of 1 or more"),
        ({"window": (2, 2), "grid": (4, 4, 4)}, "has other axes than"),
        ({"shift": "left"}, "shift=left is not supported"),
        ({"shift": "double", "shifted_ratio": 1.0}, "no fraction of the heads"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        WindowAttention(**options)


def test_shared_keys_are_not_torn_apart(shared: Program) -> None:
    with pytest.raises(NoMatchError, match="has 2 heads of keys, which 3 of 4 query heads"):
        run_passes(
            shared, [WindowAttention(window=(2,), shift="double", shifted_ratio=0.25)]
        )  # fmt: skip
    new, _ = run_passes(shared, [WindowAttention(window=(2,), shift="double")])
    assert len(new.attentions()) == 2


@pytest.fixture(scope="module")
def shared() -> Program:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.out = torch.nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
            k, v = self.kv(x).unflatten(-1, (2, 2, 2)).transpose(1, 3).unbind(2)
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.out(y.transpose(1, 2).flatten(2))

    return capture(Shared().eval(), (torch.randn(2, 16, 8),))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "inductor"])
def test_engines_reload_and_compute_it(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = dit.DiT(replace(dit.TOY, depth=2)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = model.example_inputs()
    pass_ = WindowAttention(window=(3,), shift="double")
    new, _ = run_passes(capture(model, inputs), [pass_])
    bw.compile(model, [pass_], inputs, backend=backend).save(tmp_path / "engine.bw")
    engine = bw.load(tmp_path / "engine.bw")
    torch.testing.assert_close(engine(*inputs), run(new, inputs)[0], atol=1e-4, rtol=1e-4)
