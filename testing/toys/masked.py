"""A BERT that fills in blanked characters of the manual."""

from __future__ import annotations

import sys

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ...models import bert as bert_file
from ...models.bert import Bert, BertConfig
from . import data, starts, training
from .cache import trained
from .scores import bits
from .starts import with_near_sight
from .toy import Inputs, Model, Task, Toy

CONTEXT = 128
BATCH = 8  # sequences in the example and in each step of scoring
BLANKED = 0.15  # fraction of the characters
SHOWN = -100  # the target of a character that is not blanked
CONFIG = BertConfig(vocab=data.VOCAB, context=CONTEXT, dim=128, heads=4, depth=4, ffn_dim=512)
PLAN = training.Plan(steps=1600, batch=4, rate=1e-3)


def bert() -> Toy:
    """Return a BERT of 4 blocks, 0.8 million parameters; its pooler is not trained.

    Quality is `bits_per_blank`, read out of the features with the model's own embedding table.
    """
    text = data.text()
    held = data.windows(text.validation, CONTEXT, BATCH)
    model = trained(
        "bert",
        build,
        lambda: training.train(build, blanks_loss(text.train, PLAN.batch), PLAN, "bert"),
        *(CONFIG, PLAN, bert_file, data, starts, training, sys.modules[__name__]),
    )
    table = model.tokens.weight.detach().clone()
    blanked = torch.rand(held.shape, generator=torch.Generator().manual_seed(0)) < BLANKED
    return Toy(
        model=model,
        task=blanks(text.train, table),
        example_inputs=inputs(held[:BATCH], blanked[:BATCH]),
        validation=(held, blanked),
        score=lambda model: {"bits_per_blank": bits_per_blank(model, held, blanked, table)},
    )


def build() -> Bert:
    """Return an untrained model."""
    return with_near_sight(Bert(CONFIG))


def inputs(tokens: Int[Tensor, "batch seq"], blanked: Bool[Tensor, "batch seq"]) -> Inputs:
    """Return what the model is called with: one segment, no padding."""
    shown = tokens.masked_fill(blanked, data.BLANK)
    return shown, torch.zeros_like(shown), torch.ones_like(blanked)


def blanks(tokens: Int[Tensor, " characters"], table: Float[Tensor, "vocab dim"]) -> Task:
    """Return the task of filling in random blanks in windows that begin anywhere."""

    def draw(count: int, generator: Generator) -> tuple[Inputs, Tensor]:
        starts = torch.randint(len(tokens) - CONTEXT, (count, 1), generator=generator)
        batch = tokens[starts + torch.arange(CONTEXT)]
        blanked = torch.rand(batch.shape, generator=generator) < BLANKED
        return inputs(batch, blanked), batch.masked_fill(~blanked, SHOWN)

    def loss(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        nats = F.cross_entropy(
            (outputs[0] @ table.T).transpose(1, 2), target, ignore_index=SHOWN, reduction="none"
        )
        return nats.sum(1) / (target != SHOWN).sum(1).clamp(min=1)

    return Task(draw, loss)


def blanks_loss(tokens: Int[Tensor, " characters"], count: int) -> training.Loss:
    """Return the loss of a batch of blanks, read out with the table as it is just then."""

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        task = blanks(tokens, model.get_parameter("tokens.weight"))
        return training.task_loss(task, count)(model, generator)

    return loss


def bits_per_blank(
    model: Model,
    windows: Int[Tensor, "count seq"],
    blanked: Bool[Tensor, "count seq"],
    table: Float[Tensor, "vocab dim"],
) -> float:
    """Return the mean cross-entropy of a blanked character given its surroundings, in bits."""
    total = 0.0
    for tokens, blank in zip(windows.split(BATCH), blanked.split(BATCH), strict=True):
        features, _ = model(*inputs(tokens, blank))
        logits = features[blank] @ table.T
        total += F.cross_entropy(logits, tokens[blank], reduction="sum").item()
    return bits(total / int(blanked.sum()))
