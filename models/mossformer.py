"""MossFormer: separates voices of one recording by gated attention within and across chunks.

    V' = local(v) + linear(v)      U' = local(u) + linear(u)      x = x + out(U' v * sigmoid(V' u))

    local    relu(q @ k.T / chunk)^2 @ v        within a chunk of frames, no softmax
    linear   q' @ (k'.T @ v) / frames           over all frames

Queries and keys, of both kinds, are one narrow projection of a frame, scaled and shifted. One head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class MossFormerConfig:
    """Sizes of a MossFormer.

    Attributes:
        dim: Width of the stream, even.
        qk_dim: Width of queries and keys.
        expansion: Width of values and gates together, in widths of the stream; 4, as gates are
            twice as wide as the stream.
        depth: Blocks.
        chunk: Frames that attend to each other directly.
        rotary_dim: First dimensions of queries and keys that are rotated.
        kernel: Samples of a frame; frames begin half as many apart.
        smoothing: Frames that a projection's depth-wise convolution sees, odd.
        voices: Voices to separate.
        seconds: Length of the example, at 8 kHz.

    Source: Zhao and Ma, 2023, arXiv:2302.11824, with the code released in ModelScope.
    """

    dim: int = 512
    qk_dim: int = 128
    expansion: int = 4
    depth: int = 24
    chunk: int = 256
    rotary_dim: int = 32
    kernel: int = 16
    smoothing: int = 17
    voices: int = 2
    seconds: float = 1.0


MOSSFORMER_L = MossFormerConfig()
TOY = MossFormerConfig(
    dim=8, qk_dim=4, depth=3, chunk=4, rotary_dim=2, kernel=4, smoothing=3, seconds=0.0025
)


class MossFormer(nn.Module):
    """Encoder of samples into frames, masks for each voice, and decoder."""

    def __init__(self, config: MossFormerConfig) -> None:
        super().__init__()
        self.config = config
        stride = config.kernel // 2
        self.encoder = nn.Conv1d(1, config.dim, config.kernel, stride, bias=False)
        self.masks = MaskNet(config)
        self.decoder = nn.ConvTranspose1d(config.dim, 1, config.kernel, stride, bias=False)

    def forward(
        self, sound: Float[Tensor, "batch samples"]
    ) -> Float[Tensor, "batch voices samples"]:
        frames = F.relu(self.encoder(sound[:, None]))  # [batch, dim, seq]
        voices = frames[:, None] * self.masks(frames)
        found = self.decoder(voices.flatten(0, 1)).unflatten(0, voices.shape[:2])[:, :, 0]
        missing = sound.shape[1] - found.shape[2]
        return F.pad(found, (0, missing))

    def example_inputs(self, batch: int = 2) -> tuple[Tensor]:
        """Return a valid batch of recordings."""
        samples = round(8000 * self.config.seconds)
        waves = torch.linspace(0, 40, batch * samples).reshape(batch, samples)
        return (waves.sin(),)


class MaskNet(nn.Module):
    """Blocks between convolutions, from frames to a mask for each voice."""

    def __init__(self, config: MossFormerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.voices = config.voices
        self.norm = nn.GroupNorm(1, dim, eps=1e-8)
        self.inner = nn.Conv1d(dim, dim, 1, bias=False)
        self.positions = nn.Parameter(torch.ones(1))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.block_norm = nn.LayerNorm(dim)
        self.last_norm = nn.GroupNorm(1, dim, eps=1e-8)
        self.activation = nn.PReLU()
        self.split = nn.Conv1d(dim, dim * config.voices, 1)
        self.value = nn.Conv1d(dim, dim, 1)
        self.gate = nn.Conv1d(dim, dim, 1)
        self.out = nn.Conv1d(dim, dim, 1, bias=False)

    def forward(self, x: Float[Tensor, "batch dim seq"]) -> Float[Tensor, "batch voices dim seq"]:
        skip = self.inner(self.norm(x))
        y = skip.transpose(1, 2)
        y = y + self.positions * waves(y.shape[1], y.shape[2], y)
        for block in self.blocks:
            y = block(y)
        y = skip + self.last_norm(self.block_norm(y).transpose(1, 2))
        y = self.split(self.activation(y)).unflatten(1, (self.voices, -1)).flatten(0, 1)
        y = self.out(torch.tanh(self.value(y)) * torch.sigmoid(self.gate(y)))
        return F.relu(y).unflatten(0, (-1, self.voices))


class Block(nn.Module):
    """Attention and gates in one unit, beside a residual."""

    def __init__(self, config: MossFormerConfig) -> None:
        super().__init__()
        self.config = config
        dim, wide = config.dim, config.expansion * config.dim
        self.values = ConvProjection(dim, wide, config.smoothing)
        self.narrow = ConvProjection(dim, config.qk_dim, config.smoothing)
        self.gain = nn.Parameter(0.02 * torch.randn(4, config.qk_dim))
        self.shift = nn.Parameter(torch.zeros(4, config.qk_dim))
        self.out = ConvProjection(wide // 2, dim, config.smoothing)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        early, late = x.chunk(2, dim=-1)
        shifted = torch.cat((F.pad(early, (0, 0, 1, -1)), late), dim=-1)
        both = self.values(shifted)
        v, u = both.chunk(2, dim=-1)
        copies = self.narrow(shifted)[:, None] * self.gain[:, None] + self.shift[:, None]
        turned = rotate(copies, self.config.rotary_dim)  # [batch, 4, seq, qk_dim]
        q, linear_q, k, linear_k = turned.unbind(1)
        attended = joint_attention(q, linear_q, k, linear_k, both, self.config.chunk)
        v_seen, u_seen = attended.chunk(2, dim=-1)
        result: Tensor = x + self.out((u_seen * v) * torch.sigmoid(v_seen * u))
        return result


class ConvProjection(nn.Module):
    """Norm by one scale, linear layer, SiLU, and a depth-wise convolution beside a residual."""

    def __init__(self, inputs: int, outputs: int, smoothing: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.linear = nn.Linear(inputs, outputs)
        self.smooth = nn.Conv1d(
            outputs, outputs, smoothing, padding=smoothing // 2, groups=outputs, bias=False
        )

    def forward(self, x: Float[Tensor, "batch seq inputs"]) -> Float[Tensor, "batch seq outputs"]:
        size = x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        y = F.silu(self.linear(x / size.clamp_min(1e-5) * self.scale))
        result: Tensor = y + self.smooth(y.transpose(1, 2)).transpose(1, 2)
        return result


def joint_attention(
    query: Float[Tensor, "batch seq qk_dim"],
    linear_query: Float[Tensor, "batch seq qk_dim"],
    key: Float[Tensor, "batch seq qk_dim"],
    linear_key: Float[Tensor, "batch seq qk_dim"],
    value: Float[Tensor, "batch seq value_dim"],
    chunk: int,
) -> Float[Tensor, "batch seq value_dim"]:
    """Attend within chunks by squared rectified scores, and to all frames linearly."""
    seq = value.shape[1]
    q, k, v = (
        F.pad(x, (0, 0, 0, -seq % chunk)).unflatten(1, (-1, chunk)) for x in (query, key, value)
    )
    scores = F.relu(q @ k.mT / chunk).square()  # [batch, chunks, chunk, chunk]
    local = (scores @ v).flatten(1, 2)[:, :seq]
    return local + linear_query @ (linear_key.mT @ value / seq)


def rotate(x: Float[Tensor, "batch kinds seq dim"], dims: int) -> Tensor:
    """Rotate pairs of neighbours among the first `dims` features by their frame's number."""
    exponents = torch.arange(0, dims, 2, device=x.device) / dims
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * 1e4**-exponents
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., :dims:2], x[..., 1:dims:2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, x[..., dims:]), dim=-1)


def waves(seq: int, dim: int, like: Tensor) -> Float[Tensor, "seq dim"]:
    """Return positions: sines, then cosines, at frequencies from 1 towards 1/10000."""
    exponents = torch.arange(0, dim, 2, device=like.device) / dim
    angles = torch.arange(seq, device=like.device)[:, None] * torch.exp(-math.log(1e4) * exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(like.dtype)
