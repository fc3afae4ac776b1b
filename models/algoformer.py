"""AlgoFormer: blocks before a loop, blocks that run again and again, blocks after it.

    z_0 = pre(x)        z_(t+1) = loop(z_t), `times` times        y = post(z_times)

Meant for problems that an iterative algorithm solves: the blocks before the loop prepare, each turn
is one step of the algorithm, the blocks after it read the answer. How often the loop turns is no
part of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .gpt import Block, GPTConfig

State = Float[Tensor, "batch seq dim"]


@dataclass(frozen=True, kw_only=True)
class AlgoFormerConfig:
    """Sizes of an AlgoFormer.

    Attributes:
        inputs: Numbers per token.
        outputs: Numbers that are predicted at every token.
        context: Longest sequence.
        dim: Width of the residual stream, a multiple of `heads`.
        heads: Attention heads.
        ffn_dim: Hidden neurons of a feed-forward network.
        pre: Blocks before the loop.
        loop: Blocks in the loop.
        post: Blocks after it.
        times: Turns of the loop, unless a call says otherwise.
        inject: What is added to the state before each turn: nothing, what the blocks before the
            loop put out, or the embedded input.
        from_zero: Whether the loop begins with zeros; what is injected is then all it knows.
        norm_between: Whether a norm follows each turn.
        window: Last turns whose gradients are kept in training; None keeps all.

    Source: Gao et al., 2025, arXiv:2402.13572. What is injected, zeros at first and the window are
        those of Yang et al., 2024, arXiv:2311.12424; code: github.com/Leiay/looped_transformer.
    """

    inputs: int = 20
    outputs: int = 1
    context: int = 83
    dim: int = 256
    heads: int = 8
    ffn_dim: int = 1024
    pre: int = 1
    loop: int = 1
    post: int = 1
    times: int = 20
    inject: Literal["nothing", "prepared", "embedded"] = "nothing"
    from_zero: bool = False
    norm_between: bool = False
    window: int | None = None


ALGOFORMER = AlgoFormerConfig()
LOOPED = AlgoFormerConfig(pre=0, post=0, times=30, inject="embedded", from_zero=True, window=15)
STANDARD = AlgoFormerConfig(pre=12, loop=0, post=0, times=0)  # a transformer of 12 blocks
TOY = AlgoFormerConfig(
    inputs=3, outputs=2, context=16, dim=8, heads=2, ffn_dim=12, times=3, inject="prepared"
)


class AlgoFormer(nn.Module):
    """A causal decoder of numbers whose middle blocks are run several times."""

    def __init__(self, config: AlgoFormerConfig) -> None:
        super().__init__()
        self.config = config
        sizes = GPTConfig(dim=config.dim, heads=config.heads, ffn_dim=config.ffn_dim)
        self.embed = nn.Linear(config.inputs, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.pre = nn.Sequential(*(Block(sizes) for _ in range(config.pre)))
        self.loop = nn.Sequential(*(Block(sizes) for _ in range(config.loop)))
        self.between = nn.LayerNorm(config.dim) if config.norm_between else nn.Identity()
        self.post = nn.Sequential(*(Block(sizes) for _ in range(config.post)))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.outputs)

    def forward(
        self, x: Float[Tensor, "batch seq inputs"], times: int | None = None
    ) -> Float[Tensor, "batch seq outputs"]:
        """Predict at every token, from it and those before it, after `times` turns."""
        return self.predictions(x, times)[-1]

    def predictions(
        self, x: Float[Tensor, "batch seq inputs"], times: int | None = None, last: int = 1
    ) -> list[Tensor]:
        """Return what is predicted after each of the `last` turns, as training supervises it."""
        turns = self.config.times if times is None else times
        places = torch.arange(x.shape[1], device=x.device)
        embedded = self.embed(x) + self.positions(places)  # [batch, seq, dim]
        prepared = self.pre(embedded)
        added = {"nothing": None, "prepared": prepared, "embedded": embedded}[self.config.inject]
        start = torch.zeros_like(prepared) if self.config.from_zero else prepared
        window = self.config.window if self.training else None
        states = repeat(self.turn, start, turns, added=added, window=window)
        return [self.head(self.norm(self.post(state))) for state in states[-last:]]

    def turn(self, state: State) -> State:
        """Run the loop once."""
        turned: State = self.between(self.loop(state))
        return turned

    def example_inputs(self, batch: int = 2, seq: int = 16) -> tuple[Tensor]:
        """Return a valid batch of sequences."""
        shape = batch, min(seq, self.config.context), self.config.inputs
        return (torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape),)


def repeat(
    step: Callable[[Tensor], Tensor],
    state: Tensor,
    times: int,
    *,
    added: Tensor | None = None,
    window: int | None = None,
) -> list[Tensor]:
    """Apply a step several times and return all states, the first one included.

    Args:
        step: Maps a state to the next.
        state: Where to begin.
        times: How often.
        added: Added to each state before the step.
        window: Steps at the end whose gradients are kept; those before them compute none.
    """
    states = [state]
    for index in range(times):
        forgotten = window is not None and index < times - window
        with torch.no_grad() if forgotten else nullcontext():
            states.append(step(states[-1] if added is None else states[-1] + added))
    return states
