"""ProxyAttention: windows at first, and what proxies and shifted windows add when they are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.driver.recover import Recover
from blockwright.ir.capture import capture
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize.added import AddedAttention
from blockwright.ir.run import run
from blockwright.models import dit
from blockwright.passes import ProxyAttention, WindowAttention
from blockwright.passes.proxy_attention import costs
from blockwright.passes.shared.proxies import Far, normed
from blockwright.passes.shared.tiling import Tiling
from blockwright.testing.families import Family, family

SMALL = {"window": (2,), "only_cheaper": False}


@pytest.fixture(scope="module")
def small() -> Family:
    return family("dit")  # 4 x 4 patches


@pytest.fixture(scope="module")
def replaced(small: Family) -> Program:
    return run_passes(small.program, [ProxyAttention(**SMALL)], recover=False)[0]


def test_golden(small: Family, golden: Callable[[str, str], None]) -> None:
    pass_ = ProxyAttention(**SMALL, shifted=False)
    new, (step,) = run_passes(small.program, [pass_], [small.inputs], recover=False)
    golden("proxy_attention", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize(("name", "others"), [("dit", {}), ("vit", {"prefix": 1})])
def test_it_begins_as_windows(name: str, others: dict[str, int]) -> None:
    of = family(name)
    options = {"window": (2,) if name == "dit" else (1,), **others}
    new, _ = run_passes(of.program, [ProxyAttention(**options, only_cheaper=False)], recover=False)
    near, _ = run_passes(of.program, [WindowAttention(**options)])
    torch.testing.assert_close(run(new, of.inputs), run(near, of.inputs))


def changed(program: Program, part: str) -> Program:
    """Return a program with other weights for a part of each block."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(t.shape, generator=generator) if part in name else t
        for name, t in program.tensors.items()
    }
    return program.with_(tensors=tensors)


def test_closed_layers_hide_what_is_before_them(replaced: Program, small: Family) -> None:
    (before,) = run(replaced, small.inputs)
    for part in ("far.query", "far.told", "shifted.attention.qkv"):
        assert any(part in name for name in replaced.tensors)
        assert torch.equal(run(changed(replaced, part), small.inputs)[0], before)
    for part in ("far.out.weight", "behind.weight"):
        assert not torch.equal(run(changed(replaced, part), small.inputs)[0], before)


def far(program: Program, window: tuple[int, ...], proxy: str) -> Far:
    attention = program.regions(AddedAttention)[0].attention
    module = Far(attention, Tiling((4, 4), window, (0, 0)), 0, 0, proxy, seed=0)
    nn.init.normal_(module.out.weight)
    return module


def test_proxies_by_hand(small: Family) -> None:
    module = far(small.program, (2, 2), "mean")
    x = torch.randn(3, 16, 8)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)) // 2
    window = places[:, 0] * 2 + places[:, 1]
    proxies = torch.stack([x[:, window == w].mean(1) for w in range(4)], dim=1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    p = normed(proxies)
    proxies = proxies + module.mixed(attend(module.query(p), module.key(p), module.value(p)))
    p = normed(proxies)
    expected = module.out(attend(module.asked(normed(x)), module.seen(p), module.told(p)))
    torch.testing.assert_close(module(x), expected)


def test_where_windows_are_constant_every_proxy_is_the_same(small: Family) -> None:
    x = torch.randn(2, 2, 2, 8).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    mean, first = (far(small.program, (2, 2), proxy) for proxy in ("mean", "first"))
    first.load_state_dict(mean.state_dict())
    torch.testing.assert_close(mean(x), first(x))
    x = x + torch.randn_like(x)
    assert not torch.allclose(mean(x), first(x))


def test_windows_of_one_token_make_every_token_a_proxy(small: Family) -> None:
    mean, first = (far(small.program, (1, 1), proxy) for proxy in ("mean", "first"))
    first.load_state_dict(mean.state_dict())
    x = torch.randn(2, 16, 8)
    torch.testing.assert_close(mean(x), first(x))


def test_it_is_trained_from_there(small: Family) -> None:
    pass_ = ProxyAttention(**SMALL, rate=1e-2)
    sets = [[x + 0.1 * i if x.is_floating_point() else x for x in small.inputs] for i in range(4)]
    new, (step,) = run_passes(
        small.program, [pass_], calibration=sets, recover=Recover(steps=8)
    )  # fmt: skip
    assert step.receipt.trained[0].kept
    closed = [t for name, t in new.tensors.items() if "far.out.weight" in name]
    assert closed
    assert all(t.any() for t in closed)


def test_costs_count_layers_and_pairs(small: Family, replaced: Program) -> None:
    region = small.program.regions(AddedAttention)[0]
    before, after = costs(region, 16, 4, shifted=True)
    batch, blocks = 2, 2
    old, new = (p.cost().by_kind for p in (small.program, replaced))
    kinds = ("linear", "attention")
    found = sum(new[kind] - old[kind] for kind in kinds) / (2 * batch * blocks)
    assert after - before == pytest.approx(found)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dit", {"window": (2,)}, r"would cost 1\.97 times as much"),
        ("dit", {"window": (3,), "only_cheaper": False}, "which windows of .3, 3. do not fill"),
        ("dit", {"window": (4,), "only_cheaper": False}, "has one window for its whole grid"),
        ("dit", {**SMALL, "exclude": ("*",)}, "is excluded by pattern"),
        ("dit", {**SMALL, "grid": (3, 5)}, "and not the 3 x 5 of the grid"),
        ("gpt", SMALL, "is masked"),
    ],
)
def test_declines(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NoMatchError, match=message):
        run_passes(family(name).program, [ProxyAttention(**options)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (0,)}, "give sides of 1 or more"),
        ({"prefix": -1}, "give sides of 1 or more"),
        ({"window": (2, 2, 2)}, "has other axes than the grid"),
        ({"proxy": "last"}, "proxy=last is not supported"),
        ({"epochs": 0}, "use one epoch or more"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ProxyAttention(**options)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "inductor"])
def test_engines_reload_and_compute_it(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = dit.DiT(replace(dit.TOY, depth=2)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    inputs = model.example_inputs()
    pass_ = ProxyAttention(**SMALL)
    new, _ = run_passes(capture(model, inputs), [pass_], recover=False)
    bw.compile(model, [pass_], inputs, backend=backend, recover=False).save(tmp_path / "engine.bw")
    engine = bw.load(tmp_path / "engine.bw")
    torch.testing.assert_close(engine(*inputs), run(new, inputs)[0], atol=1e-4, rtol=1e-4)
