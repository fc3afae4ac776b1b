"""Decoders that read the manual: GPT, and Llama with grouped heads and a gated feed-forward net."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import torch
from jaxtyping import Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ...models import gpt as gpt_file
from ...models import llama as llama_file
from ...models.gpt import GPT, GPTConfig
from ...models.llama import Llama, LlamaConfig
from . import data, starts, training
from .cache import trained
from .scores import bits_per_character
from .starts import with_near_sight, with_small_embeddings
from .toy import Toy

CONTEXT = 128
BATCH = 8  # sequences in the example and in each step of scoring
GPT_CONFIG = GPTConfig(vocab=data.VOCAB, context=CONTEXT, dim=128, heads=4, depth=4, ffn_dim=512)
LLAMA_CONFIG = LlamaConfig(
    vocab=data.VOCAB, context=CONTEXT, dim=128, heads=4, kv_heads=2, head_dim=32, depth=4,
    ffn_dim=352, tied=True,
)  # fmt: skip
PLAN = training.Plan(steps=1600, batch=4, rate=2e-3)


def gpt() -> Toy:
    """Return a GPT of 4 blocks, 0.8 million parameters.

    Quality is `bits_per_character`.
    """
    return decoder("gpt", build_gpt, gpt_file, GPT_CONFIG)


def llama() -> Toy:
    """Return a Llama of 4 blocks whose query heads share keys and values in pairs.

    Quality is `bits_per_character`.
    """
    return decoder("llama", build_llama, llama_file, LLAMA_CONFIG)


def build_gpt() -> GPT:
    """Return an untrained GPT."""
    return with_near_sight(GPT(GPT_CONFIG))


def build_llama() -> Llama:
    """Return an untrained Llama."""
    return with_small_embeddings(Llama(LLAMA_CONFIG))


def decoder(name: str, build: Callable[[], nn.Module], source: ModuleType, config: object) -> Toy:
    """Train a decoder on the manual, or read it from the cache."""
    text = data.text()
    held = data.windows(text.validation, CONTEXT + 1, BATCH)
    model = trained(
        name,
        build,
        lambda: training.train(build, next_character_loss(text.train, PLAN.batch), PLAN, name),
        *(config, PLAN, source, data, starts, training, sys.modules[__name__]),
    )
    return Toy(
        model=model,
        example_inputs=(held[:BATCH, :-1].contiguous(),),
        validation=(held,),
        score=lambda model: {"bits_per_character": bits_per_character(model, held, BATCH)},
    )


def next_character_loss(tokens: Int[Tensor, " characters"], count: int) -> training.Loss:
    """Return the loss of predicting each next character in windows that begin anywhere."""

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        starts = torch.randint(len(tokens) - CONTEXT, (count, 1), generator=generator)
        batch = tokens[starts + torch.arange(CONTEXT + 1)]
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    return loss
