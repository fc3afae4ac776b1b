"""S2AFormer as we reconstruct it: strips attend to cells, and the program is the module."""

from __future__ import annotations

import torch

import blockwright as bw
from blockwright.ir.run import run
from blockwright.models import s2aformer


def test_the_program_is_the_module() -> None:
    torch.manual_seed(0)
    model = s2aformer.S2AFormer(s2aformer.TOY).eval()
    inputs = model.example_inputs()
    program = bw.capture(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(run(program, list(inputs))[0], model(*inputs))
    attentions = program.attentions()
    assert [a.heads for a in attentions] == [1, 1, 2, 2]
    assert all(a.head_dim == 1 for a in attentions)


def test_a_key_sees_its_cell_alone() -> None:
    layer = s2aformer.StripSelfAttention(4, 2, 2, 1)
    x = torch.randn(1, 4, 4, 4, requires_grad=True)
    layer.reduce(x)[0, :, 0, 1].sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum((0, 1)) > 0
    assert seen.nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]


def test_half_of_the_parameters_of_full_attention() -> None:
    dim = 64
    strips = s2aformer.StripSelfAttention(dim, 2, 4, 1)
    full = 4 * dim * (dim + 1)
    assert sum(p.numel() for p in strips.parameters()) < 0.7 * full
