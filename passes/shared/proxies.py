"""What tokens learn of each other through one proxy per window.

    p = mean of each window             p = p + attention(norm(p))
    x + out(cross_attention(norm(x), norm(p)))                     out: zero at first

Source: Wang et al., Qihoo-T2X, 2024, arXiv:2409.04005 (global information interaction module).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...ir.recognize import Attention, Layer
from ...ir.region_module import RegionModule
from .tiling import Tiling

EPS = 1e-6


class Far(nn.Module):
    """What proxies tell all tokens.

    Args:
        attention: Starts the attention among proxies; has its four layers, all dense.
        tiling: The windows, which fill the grid.
        prefix: Tokens in front of the grid, which are told nothing.
        suffix: Tokens behind the grid, likewise.
        proxy: What stands for a window: its `mean` or its `first` token.
        seed: Draws the layers that read proxies.
    """

    def __init__(
        self, attention: Attention, tiling: Tiling, prefix: int, suffix: int, proxy: str, seed: int
    ) -> None:
        super().__init__()
        self.tiling, self.proxy = tiling, proxy
        self.around = prefix, suffix
        query, key, value, output = attention.layers
        self.heads, self.kv_heads = (
            layer.weight.shape[0] // (attention.head_dim or 1) for layer in (query, key)
        )
        self.query, self.key, self.value = copied(query), copied(key), copied(value)
        self.mixed = copied(output)
        generator = torch.Generator().manual_seed(seed)
        self.asked, self.seen = drawn(query, generator), drawn(key, generator)
        self.told, self.out = drawn(value, generator), blank(output)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        front, behind = self.around
        tokens = x[:, front : x.shape[1] - behind]
        cells = self.tiling.split(tokens[:, None])  # [windows, batch, cells, dim]
        proxies = (cells.mean(dim=2) if self.proxy == "mean" else cells[:, :, 0]).transpose(0, 1)
        p = normed(proxies)
        proxies = proxies + self.mixed(self._attend(self.query(p), self.key(p), self.value(p)))
        p = normed(proxies)
        y = self.out(self._attend(self.asked(normed(tokens)), self.seen(p), self.told(p)))
        return F.pad(y, (0, 0, front, behind)) if any(self.around) else y

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "batch seq features"]:
        counts = self.heads, self.kv_heads, self.kv_heads
        query, key, value = (
            x.unflatten(-1, (count, -1)).transpose(1, 2)
            for x, count in zip((q, k, v), counts, strict=True)
        )
        shared = self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(query, key, value, enable_gqa=shared)
        return y.transpose(1, 2).flatten(2)


class Proxied(nn.Module):
    """Far attention, then attention within windows, then within shifted ones.

    Args:
        far: Adds to the stream what proxies tell.
        near: The sublayer, with its attention within windows.
        shifted: The same with shifted windows and weights of its own, or None.
        behind: What is behind it, zero at first.
        pick: Which of the inputs is the stream.
    """

    def __init__(
        self,
        far: Far,
        near: RegionModule,
        shifted: RegionModule | None,
        behind: nn.Linear | None,
        pick: int,
    ) -> None:
        super().__init__()
        self.far, self.near, self.shifted, self.behind = far, near, shifted, behind
        self.pick = pick

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[self.pick]
        x = self._with(self.near, x + self.far(x), inputs)
        if self.shifted is None or self.behind is None:
            return x
        return x + self.behind(self._with(self.shifted, x, inputs) - x)

    def _with(self, part: RegionModule, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Compute the sublayer on another stream."""
        y: Tensor = part(*inputs[: self.pick], x, *inputs[self.pick + 1 :])
        return y


def normed(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Return vectors of mean 0 and deviation 1."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def copied(layer: Layer) -> nn.Linear:
    """Return a layer of its own with the weights of another."""
    return _linear(layer.weight.clone(), None if layer.bias is None else layer.bias.clone())


def drawn(layer: Layer, generator: torch.Generator) -> nn.Linear:
    """Return a layer of the same sizes with random weights."""
    weight = torch.randn(layer.weight.shape, generator=generator) / layer.weight.shape[1] ** 0.5
    return _linear(weight.to(layer.weight), layer.weight.new_zeros(len(weight)))


def blank(layer: Layer) -> nn.Linear:
    """Return a layer of the same sizes whose results are zero."""
    weight = torch.zeros_like(layer.weight)
    return _linear(weight, weight.new_zeros(len(weight)))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
