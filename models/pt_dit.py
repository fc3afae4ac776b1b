"""PT-DiT: a diffusion transformer that sees far through few tokens, and near through windows.

    p = mean of each window                              proxies, as many as there are windows
    p = p + attention(norm(p))                           far, among proxies
    x = x + out(cross_attention(norm(x), norm(p)))       back to all tokens
    x = x + gate * attention(modulate(norm(x)))          near, within windows
    x = x + out(gate * attention(modulate(norm(x))))     the same within shifted windows
    x = x + cross_attention(x, text)
    x = x + gate * down(gelu(up(modulate(norm(x)))))

Both `out` begin at zero. One layer serves all blocks for shifts, scales and gates, as in PixArt,
and a block adds a table of its own. Images and videos differ in their grid alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .dit import zero_linear
from .pixart import condition_mlp, ramp, waves

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class PTDiTConfig:
    """Sizes of a PT-DiT.

    Attributes:
        grid: Latent frames, height and width in patches, multiples of `window`.
        window: Frames, height and width of a window, and of what a proxy stands for.
        patch: Height and width of a patch.
        channels: Channels of a latent.
        text_dim: Width of a text token.
        dim: Width of the residual stream, a multiple of `heads` and of 6.
        heads: Attention heads.
        depth: Blocks.
        ffn_dim: Hidden neurons of a feed-forward network.
        proxy: What stands for a window: its `mean` or its `first` token.
        shifted: Whether blocks have attention within shifted windows as well.
        closed: Whether far and shifted attention end in a layer that begins at zero.

    Source: Wang et al., Qihoo-T2X, 2024, arXiv:2409.04005 (version 2).
    Differs: shift, scale and gate of a sample hold for all of its tokens, in batches too; shifted
        windows keep regions apart entirely, not by -10000; windows and proxies have one size.
    """

    grid: Grid = (1, 64, 64)
    window: Grid = (1, 8, 8)
    patch: int = 2
    channels: int = 4
    text_dim: int = 4096
    dim: int = 1152
    heads: int = 16
    depth: int = 28
    ffn_dim: int = 4608
    proxy: str = "mean"
    shifted: bool = True
    closed: bool = True

    @property
    def counts(self) -> Grid:
        """Windows along each axis."""
        frames, rows, columns = (n // w for n, w in zip(self.grid, self.window, strict=True))
        return frames, rows, columns

    @property
    def shift(self) -> Grid:
        """Tokens by which shifted windows begin later, along each axis."""
        a, b, c = (w // 2 if n > w else 0 for n, w in zip(self.grid, self.window, strict=True))
        return a, b, c


PT_DIT_S = PTDiTConfig(dim=288, heads=6, depth=10, ffn_dim=1152)
PT_DIT_B = PTDiTConfig(dim=640, heads=10, depth=12, ffn_dim=2560)
PT_DIT_L = PTDiTConfig(dim=864, heads=12, depth=28, ffn_dim=3456)
PT_DIT_XL = PTDiTConfig()
PT_DIT_H = PTDiTConfig(dim=1440, heads=20, depth=30, ffn_dim=5760)
TOY = PTDiTConfig(
    grid=(1, 4, 4), window=(1, 2, 2), text_dim=6, dim=12, heads=2, depth=2, ffn_dim=16
)


class PTDiT(nn.Module):
    """Patches, blocks steered by time and text, and a head that predicts the velocity."""

    positions: Tensor

    def __init__(self, config: PTDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, area = config.dim, config.patch**2
        self.patchify = nn.Linear(config.channels * area, dim)
        self.register_buffer("positions", grid_waves(config.grid, dim), persistent=False)
        self.time = condition_mlp(dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.text_up = nn.Linear(config.text_dim, dim)
        self.text_down = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.head = nn.Linear(dim, area * config.channels)

    def forward(
        self,
        x: Float[Tensor, "batch channels frames height width"],
        text: Float[Tensor, "batch words text_dim"],
        time: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels frames height width"]:
        """Predict the velocity of a latent image (one frame) or video at a time in steps."""
        patch = self.config.patch
        x = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).permute(0, 2, 3, 5, 1, 4, 6)
        x = self.patchify(x.flatten(4).flatten(1, 3)) + self.positions  # [batch, seq, dim]
        condition = self.time(waves(time).to(x.dtype))
        parts = self.modulation(F.silu(condition)).unflatten(-1, (6, -1))
        text = self.text_down(F.gelu(self.text_up(text), approximate="tanh"))
        for block in self.blocks:
            x = block(x, text, parts)
        shift, scale = (self.table + condition[:, None]).chunk(2, dim=1)
        y = self.head(self.norm(x) * (1 + scale) + shift)
        y = y.unflatten(-1, (-1, patch, patch)).unflatten(1, self.config.grid)
        return y.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

    def example_inputs(self, batch: int = 2, words: int = 5) -> tuple[Tensor, ...]:
        """Return a valid batch of latents with text."""
        config = self.config
        frames, rows, columns = config.grid
        x = ramp(batch, config.channels, frames, rows * config.patch, columns * config.patch)
        return x, ramp(batch, words, config.text_dim), torch.linspace(10, 500, batch)


class Block(nn.Module):
    """Far, near and text attention, and a feed-forward network."""

    def __init__(self, config: PTDiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.far = ProxyAttention(config)
        self.near = WindowAttention(config, (0, 0, 0))
        self.shifted = WindowAttention(config, config.shift) if config.shifted else None
        if config.shifted:
            self.shifted_table = nn.Parameter(torch.randn(3, dim) / dim**0.5)
            self.shifted_out = zero_linear(dim, dim) if config.closed else nn.Identity()
        self.text = CrossAttention(dim, config.heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.up = nn.Linear(dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        text: Float[Tensor, "batch words dim"],
        parts: Float[Tensor, "batch 6 dim"],
    ) -> Float[Tensor, "batch seq dim"]:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.table + parts).chunk(6, dim=1)
        x = x + self.far(x)
        x = x + gate * self.near(self.norm(x) * (1 + scale) + shift)
        if self.shifted is not None:
            shift, scale, gate = (self.shifted_table + parts[:, :3]).chunk(3, dim=1)
            y = self.shifted(self.norm(x) * (1 + scale) + shift)
            x = x + self.shifted_out(gate * y)
        x = x + self.text(x, text)
        y = self.up(self.norm(x) * (1 + ffn_scale) + ffn_shift)
        return x + ffn_gate * self.down(F.gelu(y, approximate="tanh"))


class ProxyAttention(nn.Module):
    """What all tokens learn of each other through one proxy per window."""

    def __init__(self, config: PTDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.among = Attention(config.dim, config.heads)
        self.back = CrossAttention(config.dim, config.heads)
        self.out = zero_linear(config.dim, config.dim) if config.closed else nn.Identity()

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        cells = split_windows(x, self.config).unflatten(0, (x.shape[0], -1))
        proxies = cells.mean(dim=2) if self.config.proxy == "mean" else cells[:, :, 0]
        proxies = proxies + self.among(self.norm(proxies))  # [batch, windows, dim]
        seen: Tensor = self.out(self.back(self.norm(x), self.norm(proxies)))
        return seen


class WindowAttention(nn.Module):
    """Attention among the tokens of a window."""

    region: Tensor | None

    def __init__(self, config: PTDiTConfig, shift: Grid) -> None:
        super().__init__()
        self.config, self.shift = config, shift
        self.attention = Attention(config.dim, config.heads)
        regions = shift_regions(config, shift) if any(shift) else None
        self.register_buffer("region", regions, persistent=False)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        batch, back = x.shape[0], [-n for n in self.shift]
        windows = split_windows(rolled(x, self.config.grid, back), self.config)
        mask = None
        if self.region is not None:
            same = self.region[:, :, None] == self.region[:, None]  # [windows, cells, cells]
            mask = same.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
        y = join_windows(self.attention(windows, mask), self.config)
        return rolled(y, self.config.grid, list(self.shift))


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values come from one layer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], mask: Tensor | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [batch, seq, 3, heads, head_dim]
        q, k, v = qkv.transpose(1, 3).unbind(2)  # [batch, heads, seq, head_dim] each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged


class CrossAttention(nn.Module):
    """Queries from the tokens; keys and values, from one layer, from something else."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], other: Float[Tensor, "batch keys dim"]
    ) -> Float[Tensor, "batch seq dim"]:
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.key_value(other).unflatten(-1, (2, self.heads, -1))
        k, v = kv.transpose(1, 3).unbind(2)  # [batch, heads, keys, head_dim] each
        y = F.scaled_dot_product_attention(q, k, v)
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged


def rolled(x: Tensor, grid: Grid, by: list[int]) -> Float[Tensor, "batch seq dim"]:
    """Move tokens around on their grid."""
    return x.unflatten(1, grid).roll(by, dims=[1, 2, 3]).flatten(1, 3) if any(by) else x


def split_windows(x: Tensor, config: PTDiTConfig) -> Float[Tensor, "all_windows cells dim"]:
    """Return the windows of each grid."""
    inner = [n for pair in zip(config.counts, config.window, strict=True) for n in pair]
    return x.unflatten(1, inner).permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def join_windows(x: Tensor, config: PTDiTConfig) -> Float[Tensor, "batch seq dim"]:
    """Undo `split_windows`."""
    x = x.unflatten(1, config.window).unflatten(0, (-1, *config.counts))
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(1, 6)


def shift_regions(config: PTDiTConfig, shift: Grid) -> Int[Tensor, "windows cells"]:
    """Number the parts of rolled windows that do not come from the same side of the edge."""
    number = torch.zeros((), dtype=torch.int32)
    for side, moved in zip(config.grid, shift, strict=True):
        number = 2 * number[..., None] + (torch.arange(side) >= side - moved).int()
    return split_windows(number.reshape(1, -1, 1), config)[..., 0]


def grid_waves(grid: Grid, dim: int) -> Float[Tensor, "seq dim"]:
    """Return the fixed positions of a grid: waves of the frame, then of the row and the column."""
    width = dim // 6
    waves = []
    for axis, side in enumerate(grid):
        angles = torch.arange(side)[:, None] * 1e4 ** -(torch.arange(width) / width)
        line = torch.cat((angles.sin(), angles.cos()), dim=-1)  # [side, dim / 3]
        shape = [1, 1, 1, line.shape[1]]
        shape[axis] = side
        waves.append(line.reshape(shape).expand(*grid, -1))
    table = torch.cat(waves, dim=-1).flatten(0, 2)
    return F.pad(table, (0, dim - table.shape[1]))
