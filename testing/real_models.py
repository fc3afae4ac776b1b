"""Tiny models of transformers and diffusers with random weights, and what is to be found in them.

What is expected is read from the configurations and from the code of the models, not from what
recognition says: counts per stack, and the constants of the first block.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..driver.manager import run_passes
from ..ir.capture import capture
from ..ir.program import Program
from ..passes.canonicalize import Canonicalize


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What recognition is to find in a model.

    Attributes:
        blocks: Blocks per stack.
        attentions: Attentions per block, on the average; 0 where blocks have none.
        networks: Feed-forward networks per block, on the average.
        branches: Sublayers of other kinds per block, on the average.
        heads: Query heads of the first attention.
        kv_heads: Its key and value heads; as many as query heads if None.
        head_dim: Width of its heads.
        mask: What masks its scores.
        source: What it attends to.
        pairing: How it is rotated, None for not at all.
        qk_norm: Whether queries and keys are normalised.
        norm_place: Where the first block has its norms.
        activation: Of the first feed-forward network.
        gated: Whether that one is gated.
        inside: Fractions of parameters and FLOPs that are understood.
    """

    blocks: tuple[int, ...] = (3,)
    attentions: float = 1
    networks: float = 1
    branches: float = 0
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int = 4
    mask: str = "none"
    source: str = "self"
    pairing: str | None = None
    qk_norm: bool = False
    norm_place: str = "pre"
    activation: str = "gelu"
    gated: bool = False
    inside: tuple[float, float] = (1.0, 1.0)

    def counts(self) -> dict[str, Any]:
        """Return how many there are of each kind, blocks per stack."""
        total = sum(self.blocks)
        kinds = {"attentions": self.attentions, "networks": self.networks}
        kinds["branches"] = self.branches
        return {"blocks": self.blocks} | {name: round(n * total) for name, n in kinds.items()}

    def constants(self) -> dict[str, Any]:
        """Return the constants of the first block."""
        names = ["norm_place"] if self.blocks else []
        if self.attentions:
            names += ["heads", "head_dim", "mask", "source", "pairing", "qk_norm"]
        if self.networks:
            names += ["activation", "gated"]
        found = {name: getattr(self, name) for name in names}
        return found | ({"kv_heads": self.kv_heads or self.heads} if self.attentions else {})


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """One row: how a model is built and called, and what is in it.

    Attributes:
        library: `transformers` or `diffusers`.
        model: Class of the model.
        config: Class of its configuration, for transformers.
        options: Arguments of the configuration, or of the model.
        inputs: Keyword arguments of a call.
        expected: What is in it.
        gaps: What recognition finds instead of what is expected, where the two differ.
        note: What is not understood, in a few words.
        canonical: Whether it is looked at after `Canonicalize`, as it spells its layers otherwise.
    """

    library: str = "transformers"
    model: str
    config: str = ""
    options: Mapping[str, Any]
    inputs: Mapping[str, Any]
    expected: Expected
    gaps: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    canonical: bool = False

    def build(self) -> nn.Module:
        """Return the model in evaluation mode; every weight shows in its output.

        Raises:
            ImportError: The library is not installed.
        """
        library = importlib.import_module(self.library)
        torch.manual_seed(0)
        kind = getattr(library, self.model)
        if self.config:
            model: nn.Module = kind(getattr(library, self.config)(**self.options))
        else:
            model = kind(**self.options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()

    def capture(self, model: nn.Module) -> Program:
        """Capture the model, and canonicalize it where its row says so."""
        program = capture(model, dict(self.inputs))
        if self.canonical:
            program, _ = run_passes(program, [Canonicalize(), Canonicalize(allow_no_match=True)])
        return program

    def differences(self, program: Program) -> dict[str, tuple[Any, Any]]:
        """Return what was found and what should have been, where the two differ."""
        found = found_in(program)
        wanted = self.expected.counts() | self.expected.constants() | dict(self.gaps)
        both = {name: (found.get(name), value) for name, value in wanted.items()}
        return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def found_in(program: Program) -> dict[str, Any]:
    """Return counts and constants of a program, named as in `Expected`."""
    blocks = program.blocks()
    first = next((b for b in blocks if b.attentions), blocks[0] if blocks else None)
    found: dict[str, Any] = {
        "blocks": tuple(len(stack.blocks) for stack in program.stacks()),
        "attentions": sum(len(block.attentions) for block in blocks),
        "networks": sum(len(block.feed_forwards) for block in blocks),
        "branches": sum(len(block.branches) for block in blocks),
    }
    found |= {"norm_place": first.norm_place} if first else {}
    for attention in first.attentions[:1] if first else ():
        names = ("heads", "kv_heads", "head_dim", "mask", "source", "qk_norm")
        found |= {name: getattr(attention, name) for name in names}
        found["pairing"] = attention.rotary.pairing
    for network in first.feed_forwards[:1] if first else ():
        found |= {"activation": network.activation, "gated": network.is_gated}
    return found


def numbers(*shape: int) -> Tensor:
    """Return normal numbers, the same on every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def token_ids(seq: int = 6) -> Tensor:
    """Return token ids [2, seq] below 32, without the special ones."""
    return torch.arange(2 * seq).reshape(2, seq) % 29 + 3
