"""Strip attention: keys and values of cells instead of tokens, thin queries and keys.

    cells = depth-wise r x r convolution of x, stride r          q = x @ Wq.T      [seq, heads * c]
    y = softmax(q @ k.T + log(tokens of each cell)) @ v          k = cells @ Wk.T, v = cells @ Wv.T

Tokens before the grid are keys of their own. A cell at the edge of a grid that r does not divide is
the mean of the tokens it has. A key that stands for n tokens gets the weight of n keys.

Source: Xu et al., S2AFormer, 2025, arXiv:2505.22195 (abstract); the rest is our reconstruction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Affine = tuple[Tensor, Tensor | None]  # weight and bias


@dataclass(frozen=True)
class Strip:
    """How an attention is thinned out.

    Attributes:
        height: Rows of the token grid.
        width: Columns of it; they run fastest.
        prefix: Tokens before the grid.
        reduce: r; a cell is r x r tokens.
        channels: Width of a query and a key head.
    """

    height: int
    width: int
    prefix: int
    reduce: int
    channels: int

    @property
    def tokens(self) -> Float[Tensor, " keys"]:
        """How many tokens each key stands for."""
        sides = [_covered(side, self.reduce) for side in (self.height, self.width)]
        return torch.cat((torch.ones(self.prefix), torch.outer(*sides).flatten()))


@dataclass(frozen=True)
class StripWeights:
    """Weights of a strip attention.

    Attributes:
        query: [heads * channels, dim], scores' scale included.
        key: The same for keys.
        value: [heads * value_dim, dim].
        out: [dim, heads * value_dim].
    """

    query: Affine
    key: Affine
    value: Affine
    out: Affine


class Strips(nn.Module):
    """Strip attention of the tokens of a grid.

    Args:
        weights: Of the four projections.
        heads: Attention heads.
        strip: How it is thinned out.
        norm: Normalise what keys and values are made of.
        local: Add a depth-wise 3 x 3 convolution of the grid, at first zero.
    """

    sizes: Tensor | None
    whole: Tensor | None

    def __init__(
        self, weights: StripWeights, heads: int, strip: Strip, *, norm: bool, local: bool
    ) -> None:
        super().__init__()
        self.strip, self.heads = strip, heads
        like = weights.query[0]
        self.query, self.key, self.value, self.out = (
            _linear(*getattr(weights, name)) for name in ("query", "key", "value", "out")
        )
        dim, area = like.shape[1], strip.reduce**2
        cells = like.new_full((dim, 1, strip.reduce, strip.reduce), 1 / area)
        self.reduce = _parameter(cells) if area > 1 else None
        self.norm = nn.LayerNorm(dim, dtype=like.dtype, device=like.device) if norm else None
        self.local = _parameter(like.new_zeros(dim, 1, 3, 3)) if local else None
        tokens = strip.tokens.to(like)
        alike = bool((strip.tokens == strip.tokens[0]).all())
        full = bool((strip.tokens[strip.prefix :] == area).all())
        self.register_buffer("sizes", None if alike else tokens.log()[None, None, None])
        self.register_buffer("whole", None if full else area / tokens[strip.prefix :, None])
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        cells = self.cells(x)
        q = self._heads(self.query(x))
        k, v = self._heads(self.key(cells)), self._heads(self.value(cells))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.sizes, scale=1.0)
        y = self.out(y.transpose(1, 2).flatten(2))
        return y if self.local is None else y + self._near(x)

    def cells(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch keys dim"]:
        """Return what keys and values are made of: the prefix, then the cells."""
        strip = self.strip
        if self.reduce is not None:
            grid = F.pad(self._grid(x), (0, -strip.width % strip.reduce,
                                         0, -strip.height % strip.reduce))  # fmt: skip
            grid = F.conv2d(grid, self.reduce, stride=strip.reduce, groups=x.shape[-1])
            cells = grid.flatten(2).transpose(1, 2)
            cells = cells if self.whole is None else cells * self.whole
            x = torch.cat((x[:, : strip.prefix], cells), dim=1) if strip.prefix else cells
        return x if self.norm is None else self.norm(x)

    def _near(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """Return what a token is given by its neighbours in the grid."""
        assert self.local is not None
        near = F.conv2d(self._grid(x), self.local, padding=1, groups=x.shape[-1])
        return F.pad(near.flatten(2).transpose(1, 2), (0, 0, self.strip.prefix, 0))

    def _grid(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch dim height width"]:
        tokens = x[:, self.strip.prefix :].transpose(1, 2)
        return tokens.unflatten(2, (self.strip.height, self.strip.width))

    def _heads(self, x: Tensor) -> Float[Tensor, "batch heads seq channels"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def thin(
    query: Affine, key: Affine, heads: int, channels: int, scale: float
) -> tuple[Affine, Affine]:
    """Return the projections of fewer channels whose scores are nearest to scale * q @ k.T.

    Per head, the best low rank of [Wq bq]' [Wk bk], in balanced halves.

    Args:
        query: [heads * head_dim, dim] and bias, if any.
        key: The same of the keys.
        heads: Attention heads.
        channels: Width of a head afterwards, `head_dim` at most.
        scale: What scores are multiplied with; 1 afterwards.

    Source: Eckart and Young, 1936, Psychometrika 1.
    """
    wide = [_with_bias(*side).unflatten(0, (heads, -1)) for side in (query, key)]
    (q, upper), (k, lower) = (torch.linalg.qr(side.mT) for side in wide)
    u, sizes, v = torch.linalg.svd(upper @ lower.mT)
    roots = (scale * sizes[..., :channels]).sqrt().unsqueeze(-2)
    halves = ((q @ u[..., :channels]) * roots, (k @ v.mT[..., :channels]) * roots)
    found = [half.mT.flatten(0, 1).to(query[0].dtype) for half in halves]  # [heads * channels, _]
    dim = query[0].shape[1]
    bare = query[1] is None and key[1] is None
    one, two = ((f[:, :dim].contiguous(), None if bare else f[:, dim].contiguous()) for f in found)
    return one, two


def drawn(like: Tensor, heads: int, channels: int, seed: int) -> tuple[Affine, Affine]:
    """Return random projections of queries and keys, whose scores are of size one."""
    generator = torch.Generator().manual_seed(seed)
    dim = like.shape[1]
    size = dim**-0.5 * channels**-0.25
    one, two = (
        (torch.randn(heads * channels, dim, generator=generator) * size).to(like) for _ in range(2)
    )
    return (one, None), (two, None)


def square(tokens: int) -> tuple[int, int] | None:
    """Return side and prefix of a square grid of tokens, with one token before it or none."""
    for prefix in (0, 1):
        side = math.isqrt(max(tokens - prefix, 0))
        if side and side * side == tokens - prefix:
            return side, prefix
    return None


def _covered(side: int, reduce: int) -> Float[Tensor, " cells"]:
    """Return how many of a side's tokens each cell along it has."""
    cells = -(-side // reduce)
    return (side - reduce * torch.arange(cells)).clamp(max=reduce).float()


def _with_bias(weight: Tensor, bias: Tensor | None) -> Float[Tensor, "rows dim+1"]:
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return torch.cat((weight, bias[:, None]), dim=1).double()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, dim = weight.shape
    layer = nn.Linear(dim, rows, bias is not None, device="meta")
    layer.weight = _parameter(weight)
    layer.bias = layer.bias if bias is None else _parameter(bias)
    return layer


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
