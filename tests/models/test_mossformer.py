"""MossFormer: the program is the module, and what is padded is not heard."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import blockwright as bw
from blockwright.ir.run import run
from blockwright.models import mossformer


@pytest.fixture(scope="module")
def model() -> mossformer.MossFormer:
    torch.manual_seed(0)
    return mossformer.MossFormer(mossformer.TOY).eval()


def test_the_program_is_the_module(model: mossformer.MossFormer) -> None:
    inputs = model.example_inputs()
    program = bw.capture(model, inputs)
    with torch.no_grad():
        expected = model(*inputs)
    assert expected.shape == (2, 2, 20)
    torch.testing.assert_close(run(program, list(inputs))[0], expected)


def test_every_weight_is_heard(model: mossformer.MossFormer) -> None:
    for block in model.masks.blocks:
        torch.nn.init.normal_(block.gain)
    model.zero_grad()
    model(*model.example_inputs()).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize("seq", [1, 4, 5, 9])
def test_chunks_are_padded_with_nothing(seq: int) -> None:
    """Whatever the chunk, as long as it holds all frames, the scale alone changes."""
    torch.manual_seed(seq)
    q, q2, k, k2 = torch.randn(4, 1, seq, 4)
    v = torch.randn(1, seq, 6)
    linear = mossformer.joint_attention(torch.zeros_like(q), q2, k, k2, v, 4)
    local = mossformer.joint_attention(q, q2, k, k2, v, 16) - linear
    twice = mossformer.joint_attention(q, q2, k, k2, v, 32) - linear
    torch.testing.assert_close(4 * twice, local, atol=1e-5, rtol=1e-4)


def test_frames_are_turned_by_their_distance() -> None:
    x = torch.randn(4).expand(1, 1, 6, 4)
    turned = mossformer.rotate(x, 4)[0, 0]
    torch.testing.assert_close(turned.norm(dim=-1), x[0, 0].norm(dim=-1))
    torch.testing.assert_close(turned[0] @ turned[2], turned[3] @ turned[5])


def test_half_of_the_channels_come_a_frame_late() -> None:
    torch.manual_seed(0)
    block = mossformer.Block(replace(mossformer.TOY, smoothing=1)).eval()
    seen = []
    block.values.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 5, 8)
    block(x)
    assert torch.equal(seen[0][:, 1:, :4], x[:, :-1, :4])
    assert not seen[0][:, 0, :4].any()
    assert torch.equal(seen[0][..., 4:], x[..., 4:])
