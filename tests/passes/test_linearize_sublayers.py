"""Networks become linear layers: exact where they are linear, at least squares elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.dit import TOY, DiT
from blockwright.models.flux import TOY_FLUX, Flux
from blockwright.passes import (
    DropIdleFeatures,
    FuseProjections,
    LinearizeSublayers,
    PruneContiguous,
    QuantizeWeights,
)
from blockwright.testing.families import FAMILIES, family


class Network(nn.Module):
    """x + down(relu(up(norm(x)))), without the norm and far from the bend of relu."""

    def __init__(self, dim: int, linear: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        nn.init.constant_(self.up.bias, 50.0 if linear else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        x = x + self.out(y)
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def two() -> tuple[Program, list[list[Tensor]]]:
    """The network of the second block is linear."""
    torch.manual_seed(0)
    sets = [[torch.randn(4, 8, 6)] for _ in range(4)]
    model = nn.Sequential(Network(6, linear=False), Network(6, linear=True)).eval()
    return bw.capture(model, (sets[0][0],)), sets


def modulated(model: nn.Module) -> tuple[Program, list[list[Tensor]]]:
    """Return a diffusion model with random modulation, and inputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    inputs = list(model.eval().example_inputs())
    return bw.capture(model, tuple(inputs)), [inputs]


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [LinearizeSublayers(keep_ratio=0.0)], [[tokens]])
    golden("linearize_sublayers", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_a_linear_network_is_found_and_exact(two: tuple[Program, list[list[Tensor]]]) -> None:
    program, sets = two
    new, (step,) = run_passes(program, [LinearizeSublayers(keep_ratio=0.5)], calibration=sets)
    assert step.receipt.changed == ("1.up_down.residual",)
    assert step.plan.decisions["1.up_down.residual"].error < 1e-6
    ours, theirs = run(new, sets[0])[0], run(program, sets[0])[0]
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_training_begins_at_least_squares(two: tuple[Program, list[list[Tensor]]]) -> None:
    program, sets = two
    pass_ = LinearizeSublayers(include=("0.*",), keep_ratio=0.0, rate=1e-30)
    new, _ = run_passes(program, [pass_], calibration=sets)
    (plain, *_), (zero, *_) = (
        run(program, sets[0]),
        run(run_passes(program, [pass_], calibration=sets, recover=False)[0], sets[0]),
    )
    assert (run(new, sets[0])[0] - plain).norm() < 0.7 * (zero - plain).norm()


def test_norm_network_and_modulation_go() -> None:
    program, sets = modulated(DiT(TOY))
    recipe = [LinearizeSublayers(keep_ratio=0.0), DropIdleFeatures()]
    new, (one, two) = run_passes(program, recipe, sets, calibration=sets)
    dim, ffn_dim, depth = TOY.dim, TOY.ffn_dim, len(program.blocks())
    gone = 2 * dim * ffn_dim + ffn_dim + dim  # up and down
    cut = 3 * dim * dim + 3 * dim  # shift, scale and gate
    saved = program.cost().parameters - new.cost().parameters
    assert saved == depth * (gone + cut - dim * dim - dim)
    assert two.certificate is not None
    assert max(error.new for error in two.certificate.outputs.values()) < 1e-5
    assert one.receipt.trained[0].after <= one.receipt.trained[0].before
    assert [block.label for block in new.blocks()] == [block.label for block in program.blocks()]


def test_both_streams_of_flux_in_front() -> None:
    program, sets = modulated(Flux(TOY_FLUX))
    pass_ = LinearizeSublayers(include=("double_blocks.*",), keep_ratio=0.0)
    new, (step,) = run_passes(program, [pass_], calibration=sets)
    assert len(step.receipt.changed) == 6
    assert len(new.feed_forwards()) == len(program.feed_forwards()) - 6


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    model = family(name)
    pass_ = LinearizeSublayers(keep_ratio=0.0, allow_no_match=True)
    new, (step,) = run_passes(model.program, [pass_], [model.inputs], calibration=[model.inputs])
    left = len(model.program.feed_forwards()) - len(step.receipt.changed)
    assert len(new.feed_forwards()) == left
    for label, reason in step.plan.skips.items():
        kept = "is of another kind" in reason or "output matrix" in reason or "last axis" in reason
        assert kept, (label, reason)


@pytest.mark.slow
def test_dit_to_an_engine(tmp_path: Path) -> None:
    program, sets = modulated(DiT(TOY))
    recipe = [
        PruneContiguous(intervals=((1, 2),)),
        LinearizeSublayers(keep_ratio=0.5),
        DropIdleFeatures(),
        FuseProjections(allow_no_match=True),  # in DiT they are fused already
        QuantizeWeights(),
    ]
    engine = bw.compile(
        program, recipe, tuple(sets[0]), calibration=[tuple(s) for s in sets], backend="onnxruntime"
    )
    engine.save(tmp_path / "model.bw")
    again = bw.load(tmp_path / "model.bw")
    assert torch.equal(again(*sets[0]), engine(*sets[0]))
    assert len(engine.program.blocks()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": -0.1}, "is no fraction of networks"),
        ({"distance": "cosine"}, "distance=cosine is not supported"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LinearizeSublayers(**options)


def test_no_calibration_is_no_ranking(two: tuple[Program, list[list[Tensor]]]) -> None:
    with pytest.raises(OptionError, match="calibration inputs, and there are none"):
        run_passes(two[0], [LinearizeSublayers(keep_ratio=0.5)])


def test_parts_of_any_size() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            one, _, two = self.layer(x).chunk(3, dim=-1)
            return one * two

    sizes = ({0: Dim("batch", min=1, max=8), 1: Dim("seq", min=1, max=8)},)
    program = bw.capture(Parts().eval(), (torch.randn(2, 3, 4),), dynamic_shapes=sizes)
    new, _ = run_passes(program, [DropIdleFeatures()])
    x = torch.randn(5, 7, 4)
    assert torch.allclose(run(new, [x])[0], run(program, [x])[0], atol=1e-6)
    assert new.tensors["layer.weight"].shape == (8, 4)
