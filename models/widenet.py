"""WideNet: one attention and one mixture of experts serve all blocks, which keep only their norms.

    x = x + attention(norm_i(x))
    x = x + sum over chosen e of p_e * expert_e(norm'_i(x))        p = softmax(norm'_i(x) @ router)

Attention, experts and router are the same in every block i. Norms are not, so that one token may
go to other experts at another depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

BALANCE = 0.01  # published weight of `balance_loss`


@dataclass(frozen=True, kw_only=True)
class WideConfig:
    """Sizes of a stack of blocks that share their layers.

    Attributes:
        dim: Width of the residual stream, a multiple of `heads`.
        heads: Attention heads.
        depth: Blocks, a multiple of `groups`.
        ffn_dim: Hidden neurons of an expert.
        experts: Feed-forward networks; a single one needs no router.
        chosen: Experts a token goes to.
        capacity: Tokens an expert takes in training, relative to an even spread; those that come
            later are not given to it. None takes all, as evaluation does.
        noise: Standard deviation of the noise on the router's logits in training, times `experts`.
        groups: Runs of blocks with layers of their own. Only those of the last are experts.
        private_norms: Whether each block has norms of its own.
        renormalize: Whether the gates of a token add up to one.
        activate_twice: Whether the activation also follows an expert's second layer.

    Source: Xue et al., 2022, arXiv:2107.11817; code: github.com/XueFuzhao/WideNet_Code.
    Differs: there is no dropout. Every expert sees every token and a gate of zero hides what it
        was not chosen for: values are the same, work is `experts / chosen` times as much.
    """

    dim: int = 768
    heads: int = 12
    depth: int = 12
    ffn_dim: int = 4096
    experts: int = 4
    chosen: int = 2
    capacity: float | None = 1.2
    noise: float = 1.0
    groups: int = 1
    private_norms: bool = True
    renormalize: bool = False
    activate_twice: bool = False


@dataclass(frozen=True, kw_only=True)
class WideViTConfig(WideConfig):
    """Sizes of an image classifier.

    Attributes:
        image: Height and width of an image in pixels, a multiple of `patch`.
        patch: Height and width of a patch in pixels.
        channels: Channels of an image.
        classes: Outputs of the head.
    """

    image: int = 224
    patch: int = 16
    channels: int = 3
    classes: int = 1000


@dataclass(frozen=True, kw_only=True)
class WideGPTConfig(WideConfig):
    """Sizes of a decoder.

    Attributes:
        vocab: Tokens.
        context: Longest sequence.
    """

    vocab: int = 50257
    context: int = 1024


WIDENET_B = WideViTConfig()
WIDENET_L = WideViTConfig(dim=1024, heads=16, depth=24)
WIDENET_H = WideViTConfig(dim=1280, heads=16, depth=32, ffn_dim=5120)
TOY = WideViTConfig(image=8, patch=4, classes=5, dim=8, heads=2, depth=3, ffn_dim=12)
TOY_GPT = WideGPTConfig(vocab=32, context=16, dim=8, heads=2, depth=3, ffn_dim=12)

Routes = list[Tensor]  # probabilities of the router, [tokens, experts], one per call of it


class WideViT(nn.Module):
    """Patches, wide stack, final norm, mean over tokens, a layer with tanh, and head."""

    def __init__(self, config: WideViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patchify = nn.Conv2d(config.channels, config.dim, config.patch, config.patch)
        count = 1 + (config.image // config.patch) ** 2
        self.positions = nn.Parameter(0.02 * torch.randn(1, count, config.dim))
        self.stack = WideStack(config, causal=False)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.representation = nn.Linear(config.dim, config.dim)
        self.head = nn.Linear(config.dim, config.classes)

    def forward(
        self, image: Float[Tensor, "batch channels height width"], routes: Routes | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Classify images; `routes` takes what the router says in each block."""
        patches = self.patchify(image).flatten(2).transpose(1, 2)  # [batch, seq - 1, dim]
        x = F.pad(patches, (0, 0, 1, 0)) + self.positions  # the class token is its position alone
        x = self.norm(self.stack(x, routes)).mean(dim=1)
        logits: Tensor = self.head(self.representation(x).tanh())
        return logits

    def example_inputs(self, batch: int = 2) -> tuple[Tensor]:
        """Return a valid batch of images."""
        shape = batch, self.config.channels, self.config.image, self.config.image
        return (torch.linspace(-1, 1, math.prod(shape)).reshape(shape),)


class WideGPT(nn.Module):
    """Token and position embeddings, wide stack, final norm, and a head tied to the embedding."""

    def __init__(self, config: WideGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.stack = WideStack(config, causal=True)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(
        self, tokens: Int[Tensor, "batch seq"], routes: Routes | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Predict next tokens; `routes` takes what the router says in each block."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)  # [batch, seq, dim]
        logits: Tensor = self.head(self.norm(self.stack(x, routes)))
        return logits

    def example_inputs(self, batch: int = 2, seq: int = 16) -> tuple[Tensor]:
        """Return a valid batch of sequences."""
        length = min(seq, self.config.context)
        return (torch.arange(batch * length).reshape(batch, length) % self.config.vocab,)


class WideStack(nn.Module):
    """Blocks of norms, and the layers that they share."""

    def __init__(self, config: WideConfig, *, causal: bool) -> None:
        super().__init__()
        self.depth = config.depth
        last = config.groups - 1
        self.shared = nn.ModuleList(
            Shared(config, causal=causal, mixed=index == last) for index in range(config.groups)
        )
        count = config.depth if config.private_norms else 1
        self.blocks = nn.ModuleList(Block(config.dim) for _ in range(count))

    def forward(
        self, x: Float[Tensor, "batch seq dim"], routes: Routes | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        for index in range(self.depth):
            shared = self.shared[index * len(self.shared) // self.depth]
            x = self.blocks[index % len(self.blocks)](x, shared, routes)
        return x


class Block(nn.Module):
    """What a block has for itself: a norm before each of two shared layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], shared: Shared, routes: Routes | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        x = x + shared.attention(self.attention_norm(x))
        y: Tensor = x + shared.ffn(self.ffn_norm(x), routes)
        return y


class Shared(nn.Module):
    """The layers of several blocks: attention, and experts or a single network."""

    def __init__(self, config: WideConfig, *, causal: bool, mixed: bool) -> None:
        super().__init__()
        self.attention = Attention(config, causal=causal)
        self.ffn = Mixture(config) if mixed and config.experts > 1 else FeedForward(config)


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values come from one layer."""

    def __init__(self, config: WideConfig, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = config.heads, causal
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [batch, seq, 3, heads, head_dim]
        q, k, v = qkv.transpose(1, 3).unbind(2)  # [batch, heads, seq, head_dim] each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged


class FeedForward(nn.Module):
    """A feed-forward network; as an expert it is one of several."""

    def __init__(self, config: WideConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)
        self.activate_twice = config.activate_twice

    def forward(
        self, x: Float[Tensor, "batch seq dim"], routes: Routes | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        """Map each token; there is no router, and `routes` stays as it is."""
        y: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return F.gelu(y, approximate="tanh") if self.activate_twice else y


class Mixture(nn.Module):
    """Experts, and a router that chooses among them for each token."""

    def __init__(self, config: WideConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.dim, config.experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.experts))

    def forward(
        self, x: Float[Tensor, "batch seq dim"], routes: Routes | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        logits = self.router(x)
        if self.training:
            logits = logits + self.config.noise / self.config.experts * torch.randn_like(logits)
        probabilities = logits.softmax(dim=-1)  # [batch, seq, experts]
        if routes is not None:
            routes.append(probabilities.flatten(0, 1))
        gates = self.gates(probabilities)
        parts = [
            gate * expert(x)
            for gate, expert in zip(gates.split(1, dim=-1), self.experts, strict=True)
        ]
        return sum(parts[1:], start=parts[0])

    def gates(self, probabilities: Float[Tensor, "*tokens experts"]) -> Tensor:
        """Return what each expert's output is multiplied by: zero where it was not chosen."""
        chosen = choices(probabilities, self.config.chosen)
        if self.training and self.config.capacity is not None:
            fair = self.config.capacity * self.config.chosen / self.config.experts
            chosen = in_time(chosen.flatten(0, -2), fair).view_as(chosen)
        gates = probabilities * chosen
        if self.config.renormalize:
            gates = gates / gates.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        return gates


def choices(
    probabilities: Float[Tensor, "*tokens experts"], count: int
) -> Bool[Tensor, "*tokens experts"]:
    """Mark the `count` likeliest experts of each token."""
    best = probabilities.topk(count, dim=-1).indices
    return torch.zeros_like(probabilities).scatter(-1, best, 1.0) > 0


def in_time(
    chosen: Bool[Tensor, "tokens experts"], fraction: float
) -> Bool[Tensor, "tokens experts"]:
    """Leave each expert the first of its tokens, at most `fraction` of all there are.

    Differs: the released code leaves one token fewer.
    """
    return chosen & (chosen.cumsum(dim=0) <= int(fraction * len(chosen)))


def balance_loss(routes: Routes, chosen: int) -> Float[Tensor, ""]:
    """Return how uneven the experts' loads are, one per call of the router if they are even.

        experts * sum over e of (share of the choices that is e) * (mean probability of e)

    Source: arXiv:2107.11817, section 3.2.
    """
    shares = [choices(route, chosen).float().mean(dim=0) / chosen for route in routes]
    terms = [
        route.shape[-1] * (share * route.mean(dim=0)).sum()
        for route, share in zip(routes, shares, strict=True)
    ]
    return torch.stack(terms).sum()
