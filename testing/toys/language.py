"""Decoders that read the manual: GPT, a deeper one, and Llama with grouped heads and gates."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TypeVar

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
from .toy import Inputs, Task, Toy

Config = TypeVar("Config", GPTConfig, LlamaConfig)

CONTEXT = 128
BATCH = 8  # sequences in the example and in each step of scoring
GPT_CONFIG = GPTConfig(vocab=data.VOCAB, context=CONTEXT, dim=128, heads=4, depth=4, ffn_dim=512)
DEEP_CONFIG = GPTConfig(vocab=data.VOCAB, context=CONTEXT, dim=64, heads=4, depth=8, ffn_dim=256)
LLAMA_CONFIG = LlamaConfig(
    vocab=data.VOCAB, context=CONTEXT, dim=128, heads=4, kv_heads=2, head_dim=32, depth=4,
    ffn_dim=352, tied=True,
)  # fmt: skip
PLAN = training.Plan(steps=1600, batch=4, rate=2e-3)
DEEP_PLAN = training.Plan(steps=2000, batch=4, rate=2e-3)


def gpt() -> Toy:
    """Return a GPT of 4 blocks, 0.8 million parameters.

    Quality is `bits_per_character`.
    """
    return decoder("gpt", build_gpt, GPT_CONFIG, PLAN, gpt_file)


def deep_gpt() -> Toy:
    """Return a GPT of 8 narrow blocks, 0.4 million parameters, for methods that take some away.

    Quality is `bits_per_character`.
    """
    return decoder("deep-gpt", build_gpt, DEEP_CONFIG, DEEP_PLAN, gpt_file)


def llama() -> Toy:
    """Return a Llama of 4 blocks whose query heads share keys and values in pairs.

    Quality is `bits_per_character`.
    """
    return decoder("llama", build_llama, LLAMA_CONFIG, PLAN, llama_file)


def build_gpt(config: GPTConfig) -> GPT:
    """Return an untrained GPT."""
    return with_near_sight(GPT(config))


def build_llama(config: LlamaConfig) -> Llama:
    """Return an untrained Llama."""
    return with_small_embeddings(Llama(config))


def decoder(
    name: str,
    build: Callable[[Config], nn.Module],
    config: Config,
    plan: training.Plan,
    source: ModuleType,
) -> Toy:
    """Train a decoder on the manual, or read it from the cache.

    Args:
        name: Of the toy.
        build: Returns an untrained model.
        config: Its sizes.
        plan: How it is trained.
        source: Where the architecture stands.
    """
    text = data.text()
    held = data.windows(text.validation, CONTEXT + 1, BATCH)
    untrained, task = partial(build, config), next_characters(text.train)
    model = trained(
        name,
        untrained,
        lambda: training.train(untrained, training.task_loss(task, plan.batch), plan, name),
        *(config, plan, source, data, starts, training, sys.modules[__name__]),
    )
    return Toy(
        model=model,
        task=task,
        example_inputs=(held[:BATCH, :-1].contiguous(),),
        validation=(held,),
        score=lambda model: {"bits_per_character": bits_per_character(model, held, BATCH)},
    )


def next_characters(tokens: Int[Tensor, " characters"]) -> Task:
    """Return the task of predicting each next character in windows that begin anywhere."""

    def draw(count: int, generator: Generator) -> tuple[Inputs, Tensor]:
        starts = torch.randint(len(tokens) - CONTEXT, (count, 1), generator=generator)
        batch = tokens[starts + torch.arange(CONTEXT + 1)]
        return (batch[:, :-1].contiguous(),), batch[:, 1:]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        return nats.view(target.shape).mean(1)

    return Task(draw, loss)
