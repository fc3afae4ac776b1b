"""PiecewiseAttention: its invariants in fp64, and what it leaves alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.dit import TOY, DiT
from blockwright.passes import PiecewiseAttention
from blockwright.passes.shared.pieces import ORDERS, SELECTIONS, Pieces, piecewise
from blockwright.passes.shared.tiles import Tiling

PIECES = Pieces(
    block_size=64,
    kept=2,
    order="hybrid",
    selection="mean",
    cov_ref="zero",
    first=0,
    last=False,
    scale=0.25,
)
SMALL = {"block_size": 2, "density": 0.5}


def qkv(tokens: int = 1000, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth noise in fp64; the last of 16 blocks is shorter."""
    generator = torch.Generator().manual_seed(0)
    shapes = (4, kv_heads, kv_heads)
    noise = (torch.randn(1, n, tokens + 63, 16, generator=generator).double() for n in shapes)
    q, k, v = (x.unfold(2, 64, 1).mean(-1) * 8 for x in noise)
    return q, k, v


def pieces(**options: Any) -> Pieces:
    return dataclasses.replace(PIECES, **options)


def error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=PIECES.scale, enable_gqa=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("tokens", "dtype", "bound"), [(1000, torch.float64, 1e-14),
                                                       (960, torch.float32, 1e-6)])  # fmt: skip
def test_with_all_blocks_it_is_dense(
    order: str, selection: str, tokens: int, dtype: torch.dtype, bound: float
) -> None:
    given = [x.to(dtype) for x in qkv(tokens)]
    found = piecewise(*given, pieces(kept=-(-tokens // 64), order=order, selection=selection))
    assert error(found, dense(*given)) < bound


@pytest.mark.parametrize("order", ["hybrid", "zeroth", "first_block"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_equal_keys_within_blocks_leave_nothing_to_expand(order: str, selection: str) -> None:
    q, k, v = qkv()
    k = k[:, :, torch.arange(1000) // 64 * 64]
    found = piecewise(q, k, v, pieces(order=order, selection=selection))
    assert error(found, dense(q, k, v)) < 1e-13


@pytest.mark.parametrize("order", ["hybrid", "zeroth", "first_block"])
def test_rows_are_normalised(order: str) -> None:
    q, k, _ = qkv()
    found = piecewise(q, k, torch.full_like(k, 3.0), pieces(order=order))
    torch.testing.assert_close(found, torch.full_like(q, 3.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", ["hybrid", "zeroth", "first_block"])
def test_errors_fall_with_density(order: str) -> None:
    given = qkv()
    errors = [error(piecewise(*given, pieces(kept=n, order=order)), dense(*given))
              for n in (1, 2, 4, 8, 16)]  # fmt: skip
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-14


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_keys_may_change_places_within_a_block(order: str, selection: str) -> None:
    q, k, v = qkv()
    blocks = torch.arange(1000).split(64)
    places = torch.cat([block[torch.randperm(len(block))] for block in blocks])
    options = pieces(order=order, selection=selection, cov_ref="mean")
    moved = piecewise(q, k[:, :, places], v[:, :, places], options)
    assert error(moved, piecewise(q, k, v, options)) < 1e-13


def by_hand(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The hybrid order as the sum it stands for; `seen`: [heads, query blocks, blocks]."""
    tokens, scale = k.shape[2], PIECES.scale
    parts = list(zip(k.split(64, 2), v.split(64, 2), strict=True))
    moment = sum((key - key.mean(2, keepdim=True)).mT @ value for key, value in parts)
    above = below = rest = torch.zeros(1, 1, 1, 1, dtype=q.dtype)
    for number, (key, value) in enumerate(parts):
        exact = seen[None, :, :, number].repeat_interleave(64, dim=2)[:, :, :tokens, None]
        weight = (scale * q @ key.mT).exp()
        mean = (scale * q @ key.mean(2, keepdim=True).mT).exp()
        above = above + torch.where(exact, weight @ value, mean * value.sum(2, keepdim=True))
        below = below + torch.where(exact, weight.sum(-1, keepdim=True), mean * key.shape[2])
        rest = rest + torch.where(exact, 0.0, mean * key.shape[2])
    return (above + rest / tokens * scale * (q @ moment)) / below


def test_it_is_the_sum_it_stands_for() -> None:
    q, k, v = qkv(kv_heads=4)
    mean = torch.stack([block.mean(2) for block in q.split(64, 2)], dim=2)
    keys = torch.stack([block.mean(2) for block in k.split(64, 2)], dim=2)
    index = (mean @ keys.mT).topk(2).indices[0]
    seen = torch.zeros(4, 16, 16, dtype=torch.bool).scatter(-1, index, True)
    assert error(piecewise(q, k, v, PIECES), by_hand(q, k, v, seen)) < 1e-13


def test_forced_blocks_are_exact() -> None:
    """Values that only one block has come through as in dense attention, to the last bit of it."""
    q, k, v = qkv()
    for first, last, block in ((1, False, slice(0, 64)), (0, True, slice(960, 1000))):
        only = torch.zeros_like(v)
        only[:, :, block] = v[:, :, block]
        k_far = k.clone()
        k_far[:, :, block] -= 10 * q.mean((1, 2))[:, None, None]  # nobody would choose it
        options = pieces(order="drop", first=first, last=last, kept=1)
        exact = piecewise(q, k_far, only, options)
        assert error(exact, dense(q, k_far[:, :, block], v[:, :, block])) < 1e-12


def test_tiles_come_back() -> None:
    tokens = torch.arange(3 + 24.0)[None, None, :, None]
    tiling = Tiling(3, (4, 6), (2, 3))
    tiles = tiling.to_tiles(tokens)
    assert tiles.flatten().tolist()[:9] == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    assert torch.equal(tiling.to_rows(tiles), tokens)
    cube = torch.arange(64.0)[None, None, :, None]
    assert torch.equal(Tiling(0, (4, 4, 4), (2, 2, 2)).to_rows(
        Tiling(0, (4, 4, 4), (2, 2, 2)).to_tiles(cube)), cube)  # fmt: skip


class Attention(nn.Module):
    """One attention, with whatever options its op is given."""

    def __init__(self, heads: int = 2, kv_heads: int = 2, **options: Any) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(16, 8 * heads), nn.Linear(8 * heads, 16)
        self.k, self.v = nn.Linear(16, 8 * kv_heads), nn.Linear(16, 8 * kv_heads)
        self.options = {**options, "enable_gqa": heads != kv_heads}

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        other = x if y is None else y
        q, k, v = (
            t.unflatten(-1, (-1, 8)).transpose(1, 2)
            for t in (self.q(x), self.k(other), self.v(other))
        )
        attended = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.out(attended.transpose(1, 2).flatten(2))


def after(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[Program, Program]:
    old = capture(model.eval(), inputs)
    new, _ = run_passes(old, [PiecewiseAttention(**options)], [list(inputs)])
    return old, new


@pytest.fixture(scope="module")
def dit() -> DiT:
    torch.manual_seed(0)
    model = DiT(TOY).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def captured(dit: DiT) -> Program:
    return capture(dit, dit.example_inputs())


def test_golden(dit: DiT, captured: Program, golden: Callable[[str, str], None]) -> None:
    options = SMALL | {"dense_layers": 1, "dense_steps": 1, "steps": 2}
    new, (step,) = run_passes(captured, [PiecewiseAttention(**options)], [dit.example_inputs()])
    golden("piecewise_attention", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize(
    ("order", "kv_heads"), [("hybrid", 4), ("zeroth", 2), ("first_block", 2), ("drop", 4)]
)
def test_a_model_whose_blocks_are_all_kept_is_the_model(order: str, kv_heads: int) -> None:
    x = torch.randn(2, 33, 16, generator=torch.Generator().manual_seed(0))
    options = {"block_size": 8, "density": 1.0, "dense_above": 1.0, "order": order}
    old, new = after(Attention(4, kv_heads), x, **options)
    torch.testing.assert_close(run(new, [x])[0], run(old, [x])[0], rtol=1e-5, atol=1e-6)
    assert any("block_attention" in str(node.target) for node in new.main.nodes)


def test_tiles_are_blocks_of_the_grid() -> None:
    """A map that is constant on 2 by 2 tiles leaves nothing to expand, in the order of tiles."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(1, 4, 4, 16, generator=generator)
    image = patches.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    x = torch.cat((torch.randn(1, 4, 16, generator=generator), image), dim=1)
    common = {"block_size": 4, "kept": 1, "order": "zeroth"}
    model = Attention()
    old, tiled = after(model, x, **common, grid=(8, 8), tile=(2, 2), text_prefix=4)
    _, rows = after(model, x, **common)
    torch.testing.assert_close(run(tiled, [x])[0], run(old, [x])[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(run(rows, [x])[0], run(old, [x])[0], rtol=1e-4, atol=1e-4)


def test_first_steps_and_layers_are_dense(dit: DiT, captured: Program) -> None:
    inputs = list(dit.example_inputs())
    pass_ = PiecewiseAttention(**SMALL, dense_layers=1, dense_steps=2, steps=8)
    warm, (step,) = run_passes(captured, [pass_], [inputs])
    always, _ = run_passes(captured, [PiecewiseAttention(**SMALL, dense_layers=1)], [inputs])
    assert len(step.receipt.changed) == TOY.depth - 1
    assert "is one of the first, which stay dense" in step.receipt.skipped.values()
    for number in range(8):
        expected = captured if number < 2 else always
        found = run(warm, [*inputs, torch.tensor(number)])
        assert torch.equal(found[0], run(expected, inputs)[0])
    cost = [program.cost() for program in (captured, always, warm)]
    assert warm.cost().expected_flops == pytest.approx(
        cost[0].flops * 0.25 + cost[1].flops * 0.75, rel=1e-3
    )


def test_what_is_kept_is_what_is_counted() -> None:
    x = torch.randn(1, 256, 16)
    old, new = after(Attention(), x, block_size=16, kept=2)
    head, heads = 8, 2
    exact, pooled = 4 * 256 * 2 * 16 * head, 4 * 256 * 16 * head
    moments, chosen = 4 * 256 * head**2, 2 * 16**2 * head
    assert new.cost().by_kind["attention"] == heads * (exact + pooled + moments + chosen)
    assert old.cost().by_kind["attention"] == heads * 4 * 256**2 * head


@pytest.mark.parametrize(
    ("model", "inputs", "options", "reason"),
    [
        (Attention(is_causal=True), [(1, 32, 16)], {}, r"is masked \(causal\)"),
        (Attention(attn_mask=torch.ones(32, 32).triu()), [(1, 32, 16)], {}, r"is masked \("),
        (Attention(), [(1, 32, 16), (1, 8, 16)], {}, "attends to another sequence"),
        (Attention(), [(1, 3, 16)], {}, "has 3 tokens, fewer than 4"),
        (Attention(), [(1, 32, 16)], {"min_tokens": 64}, "has 32 tokens, fewer than 64"),
        (Attention(), [(1, 32, 16)], {"density": 0.9}, "would attend to 14 of 16 blocks: dense"),
        (Attention(), [(1, 32, 16)], {"exclude": ("*",)}, "is excluded by pattern"),
        (Attention(), [(1, 32, 16)], {"grid": (4, 4), "tile": (1, 2)}, "are no grid of 4x4"),
        (Attention(), [(1, 32, 16)], {"dense_layers": 1}, "is one of the first"),
    ],
)
def test_declines(
    model: nn.Module, inputs: list[tuple[int, ...]], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(NoMatchError, match=reason):
        after(model, *map(torch.zeros, inputs), **(SMALL | options))


def test_dynamic_tokens_are_declined() -> None:
    from torch.export import Dim

    program = capture(
        Attention().eval(), (torch.zeros(1, 32, 16),), dynamic_shapes=({1: Dim("seq", max=64)},)
    )
    with pytest.raises(NoMatchError, match="has no fixed number of tokens"):
        run_passes(program, [PiecewiseAttention(**SMALL)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "are no fractions of blocks"),
        ({"dense_above": 1.5}, "are no fractions of blocks"),
        ({"block_size": 0}, "block_size=0 counts nothing"),
        ({"kept": -1}, "kept=-1 counts nothing"),
        ({"order": "second"}, "order=second is not supported"),
        ({"selection": "luck"}, "selection=luck is not supported"),
        ({"cov_ref": "one"}, "cov_ref=one is not supported"),
        ({"sink": 3}, "sink=3 is not supported"),
        ({"dense_steps": 3}, "dense_steps=3 of steps=0"),
        ({"grid": (60, 64)}, r"tile=\[8, 8\] does not cut grid=\[60, 64\]"),
        ({"grid": (64, 64), "tile": (4, 4)}, "into blocks of 64"),
        ({"grid": (64, 64), "text_prefix": 77}, "behind 77 tokens"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PiecewiseAttention(**options)


def test_half_precision_stays_half() -> None:
    given = [x.to(torch.bfloat16) for x in qkv(960)]
    found = piecewise(*given, PIECES)
    assert found.dtype == torch.bfloat16
    wide = [x.double() for x in given]
    far = error(piecewise(*wide, PIECES), dense(*wide))  # rounding may choose other blocks
    assert error(found.double(), dense(*wide)) < far + 2e-2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("backend", "dense_steps"),
    [
        ("eager", 1),
        ("onnxruntime", 1),
        ("inductor", 0),
        ("inductor", 1),
    ],
)
def test_engines_come_back_from_files(backend: str, dense_steps: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 16, 16)
    pass_ = PiecewiseAttention(**SMALL, dense_steps=dense_steps, steps=2, selection="covariance")
    new, _ = run_passes(capture(model, (x,)), [pass_], [[x]])
    engine = bw.compile(model, [pass_], (x,), backend=backend, options={"threads": 1})
    engine.save(tmp_path / "model.bw")
    loaded = bw.load(tmp_path / "model.bw", trust=True)
    for step in (0, 1) if dense_steps else (None,):
        told = {} if step is None else {"step": torch.tensor(step)}
        expected = run(new, [x, *told.values()])[0]
        for each in (engine, loaded):
            torch.testing.assert_close(each(x, **told), expected, rtol=1e-4, atol=1e-5)
