"""DiT-3D: a plain DiT that moves clouds of points, seen through a grid of voxels.

    points -> voxels -> patches + positions -> DiT blocks -> voxels -> noise of each point

Some blocks attend within windows of the grid, w x w x w patches, and not among all patches. Blocks
know nothing of the grid, so those of a DiT that was trained on images can start this one:
`transfer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from .dit import time_waves, zero_linear
from .voxels import devoxelize, voxel_places, voxelize


@dataclass(frozen=True)
class DiT3DConfig:
    """Sizes of a DiT-3D.

    Attributes:
        voxels: Side of the grid of voxels, a multiple of `patch`.
        patch: Side of a patch in voxels.
        channels: Coordinates of a point, and features of a voxel.
        classes: Classes; one more label stands for none.
        dim: Width of the residual stream, a multiple of `heads` and of 6.
        heads: Attention heads.
        depth: Blocks.
        ffn_dim: Hidden neurons of a feed-forward network.
        window: Side of a window in patches; the grid of patches must hold whole windows.
        windowed: Blocks that attend within windows.

    Source: Mo et al., 2023, arXiv:2307.01831.
    Differs: windows as in the paper; the released code attends among all tokens in another order,
        and its training scripts name no windowed block. The fixed positions are a buffer.
    """

    voxels: int = 32
    patch: int = 4
    channels: int = 3
    classes: int = 1
    dim: int = 1152
    heads: int = 16
    depth: int = 28
    ffn_dim: int = 4608
    window: int = 4
    windowed: tuple[int, ...] = ()

    @property
    def side(self) -> int:
        """Side of the grid of patches."""
        return self.voxels // self.patch


DIT3D_S4 = DiT3DConfig(dim=384, heads=6, depth=12, ffn_dim=1536)
DIT3D_B4 = DiT3DConfig(dim=768, heads=12, depth=12, ffn_dim=3072)
DIT3D_L4 = DiT3DConfig(depth=24)
DIT3D_XL4 = DiT3DConfig()
TOY = DiT3DConfig(voxels=8, patch=2, dim=12, heads=2, depth=3, ffn_dim=16, window=2, windowed=(0,))


class DiT3D(nn.Module):
    """Voxels, blocks steered by time and class, and the noise at each point."""

    positions: Tensor

    def __init__(self, config: DiT3DConfig) -> None:
        super().__init__()
        self.config = config
        dim, channels, patch = config.dim, config.channels, config.patch
        self.patchify = nn.Conv3d(channels, dim, patch, patch)
        self.register_buffer("positions", grid_waves(config.side, dim), persistent=False)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.labels = nn.Embedding(config.classes + 1, dim)
        self.blocks = nn.ModuleList(
            Block(config, config.side if i in config.windowed else None)
            for i in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = zero_linear(dim, 2 * dim)
        self.head = zero_linear(dim, patch**3 * channels)

    def forward(
        self,
        points: Float[Tensor, "batch channels points"],
        time: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels points"]:
        """Predict the noise of each point.

        `time` is in steps, 0 to 1000; label `classes` stands for none.
        """
        places = voxel_places(points, self.config.voxels)
        grid = voxelize(points, places, self.config.voxels)
        return devoxelize(self.denoise(grid, time, label), places)

    def denoise(
        self,
        grid: Float[Tensor, "batch channels side side side"],
        time: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels side side side"]:
        """Predict the noise of each voxel."""
        x = self.patchify(grid).flatten(2).transpose(1, 2) + self.positions  # [batch, seq, dim]
        condition = self.time(time_waves(time, 256).to(x.dtype)) + self.labels(label)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        x = self.head(self.norm(x) * (1 + scale) + shift)
        return unpatchify(x, self.config.side, self.config.patch)

    def example_inputs(self, batch: int = 2, points: int = 64) -> tuple[Tensor, Tensor, Tensor]:
        """Return a valid batch of clouds at different times; every other has no class."""
        count = batch * self.config.channels * points
        x = torch.arange(count).mul(0.7).sin().view(batch, self.config.channels, points)
        labels = torch.arange(batch) % 2 * self.config.classes
        return x, torch.linspace(10, 500, batch), labels


class Block(nn.Module):
    """Attention and feed-forward network, each modulated, gated and beside a residual.

    Args:
        config: Sizes.
        side: Side of the grid of patches if attention is within windows.
    """

    def __init__(self, config: DiT3DConfig, side: int | None = None) -> None:
        super().__init__()
        self.window, self.side = config.window, side
        self.modulation = zero_linear(config.dim, 6 * config.dim)
        self.attention_norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], condition: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch seq dim"]:
        parts = self.modulation(F.silu(condition))[:, None]  # [batch, 1, 6 * dim]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts.chunk(6, dim=-1)
        x = x + gate * self.attend(self.attention_norm(x) * (1 + scale) + shift)
        y = self.up(self.ffn_norm(x) * (1 + ffn_scale) + ffn_shift)
        return x + ffn_gate * self.down(F.gelu(y))

    def attend(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """Attend within windows, or among all patches."""
        if self.side is None:
            whole: Tensor = self.attention(x)
            return whole
        windows = split_windows(x, self.side, self.window)
        return join_windows(self.attention(windows), self.side, self.window)


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values come from one layer."""

    def __init__(self, config: DiT3DConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [batch, seq, 3, heads, head_dim]
        q, k, v = qkv.transpose(1, 3).unbind(2)  # [batch, heads, seq, head_dim] each
        y = F.scaled_dot_product_attention(q, k, v)
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged


@dataclass(frozen=True)
class Transfer:
    """What `transfer` did, each a list of weights of the model.

    Attributes:
        copied: Have the values of the source now.
        skipped: Match no pattern, or are not in the source.
        mismatched: Have another shape in the source, and stay as they were.
    """

    copied: list[str]
    skipped: list[str]
    mismatched: list[str]


def transfer(
    weights: Mapping[str, Tensor],
    model: nn.Module,
    patterns: Sequence[str] = ("blocks.*",),
    *,
    inflate: bool = False,
) -> Transfer:
    """Start a model with the weights of another, such as a DiT-3D with those of a DiT of images.

    Patches, positions, time, classes and head differ in kind and begin anew; what is new is then
    trained, and the rest with it or not.

    Args:
        weights: `state_dict` of the source.
        model: What gets them.
        patterns: Which weights, as glob patterns; by default those of the blocks.
        inflate: Also make the patches' kernel of the one for images: each of its slices in depth
            is that kernel, divided by how many there are.

    Source: Mo et al., DiT-3D, 2023, arXiv:2307.01831, section 3.4.
    Differs: the paper copies the blocks only; inflated kernels are an extra, as in I3D (Carreira
        and Zisserman, 2017, arXiv:1705.07750).
    """
    report = Transfer([], [], [])
    for name, old in model.state_dict().items():
        new = weights.get(name)
        if inflate and new is not None and old.dim() == new.dim() + 1 and old.dim() == 5:
            new = new[:, :, None].expand(-1, -1, old.shape[2], -1, -1) / old.shape[2]
        elif not any(fnmatchcase(name, pattern) for pattern in patterns):
            new = None
        if new is None:
            report.skipped.append(name)
        elif new.shape != old.shape:
            report.mismatched.append(name)
        else:
            old.copy_(new)  # shares its memory with the model's
            report.copied.append(name)
    return report


def split_windows(
    x: Shaped[Tensor, "batch seq dim"], side: int, window: int
) -> Shaped[Tensor, "all_windows cells dim"]:
    """Return the windows of each grid."""
    inner = (side // window, window) * 3
    return x.unflatten(1, inner).permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def join_windows(
    x: Float[Tensor, "all_windows cells dim"], side: int, window: int
) -> Float[Tensor, "batch seq dim"]:
    """Undo `split_windows`."""
    x = x.unflatten(1, (window,) * 3).unflatten(0, (-1, *(side // window,) * 3))
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(1, 6)


def unpatchify(
    x: Float[Tensor, "batch seq features"], side: int, patch: int
) -> Float[Tensor, "batch channels voxels voxels voxels"]:
    """Lay patches out as a grid of voxels; the channels of a voxel stand side by side."""
    x = x.unflatten(-1, (patch, patch, patch, -1)).unflatten(1, (side, side, side))
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def grid_waves(side: int, dim: int) -> Float[Tensor, "seq dim"]:
    """Return the fixed positions of a cube: waves of x, then of y, then of z."""
    width = dim // 6
    angles = torch.arange(side)[:, None] * 1e4 ** -(torch.arange(width) / width)
    waves = torch.cat((angles.sin(), angles.cos()), dim=-1)  # [side, dim / 3]
    x = waves[:, None, None].expand(-1, side, side, -1)
    y, z = x.transpose(0, 1), x.transpose(0, 2)
    return torch.cat((x, y, z), dim=-1).flatten(0, 2)
