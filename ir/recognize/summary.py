"""Blocks of a model in a line per structure.

12 x block  pre-norm, attention 12 heads x 64 causal, ffn 3072 gelu_tanh
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..program import Program
from .attention import Attention
from .block import Block
from .experts import Experts
from .feed_forward import FeedForward
from .sublayer import Part


@dataclass(frozen=True)
class BlockClass:
    """Blocks of one structure.

    Attributes:
        count: How many there are.
        structure: Their structure, 16 hexadecimal digits.
        text: What they are, in words.
        first: Label of the first.
        last: Label of the last.
        constants: Of the block and of its sublayers, as plain data.
    """

    count: int
    structure: str
    text: str
    first: str
    last: str
    constants: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.count} x block  {self.text}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def block_classes(program: Program) -> list[BlockClass]:
    """Return the blocks of a program by structure and masks, in the order of their first ones."""
    classes: dict[tuple[str, str], list[Block]] = {}
    for block in program.blocks():
        classes.setdefault((block.structure, describe(block)), []).append(block)
    return [_class(blocks) for blocks in classes.values()]


def _class(blocks: list[Block]) -> BlockClass:
    first = blocks[0]
    constants = first.constants()
    constants["sublayers"] = [
        {"kind": s.region.kind} | s.region.constants() for s in first.sublayers
    ]
    return BlockClass(
        len(blocks), first.structure, describe(first), first.label, blocks[-1].label, constants
    )


def describe(block: Block) -> str:
    """Say in words what a block is."""
    words = [f"{block.norm_place}-norm" if block.norm_place != "none" else "no norm"]
    words += [f"{len(block.streams)} streams"] if len(block.streams) > 1 else []
    ended = [i for i, stream in enumerate(block.streams) if stream.stream_out is None]
    words += [f"stream {i} ends" for i in ended]
    words += ["parallel"] if block.is_parallel else []
    if block.modulation is not None:
        words.append(f"{block.modulation.form} modulation")
    elif block.gate_kind == "parameter":
        words.append("layer scale")
    signs = {-1: " subtracted", 0: " without bypass"}
    words += [
        _sublayer(sublayer.region) + signs.get(sublayer.residual.sign, "")
        for sublayer in block.sublayers
    ]
    return ", ".join(words)


def _sublayer(region: Part) -> str:
    if isinstance(region, Attention):
        parts = ["attention", f"{region.heads or '?'} heads x {region.head_dim or '?'}"]
        parts += [f"({region.kv_heads} kv)"] if region.kv_heads != region.heads else []
        parts += [region.source] if region.source != "self" else []
        parts += [region.mask] if region.mask in ("causal", "window") else []
        return " ".join(parts + (["rotary"] if region.rotary else []))
    if isinstance(region, FeedForward):
        gated = " gated" if region.is_gated else ""
        over = " over tokens" if region.axis == "tokens" else ""
        return f"ffn {region.ffn_dim}{gated} {region.activation}{over}"
    if isinstance(region, Experts):
        gated = " gated" if region.is_gated else ""
        chosen = f"{region.active or '?'} of {region.experts} experts x {region.ffn_dim}"
        shared = f" + {region.shared_ffn_dim} shared" if region.shared_ffn_dim else ""
        return f"ffn {chosen}{shared}{gated} {region.activation}"
    return f"branch {'-'.join(region.ops)} over {region.mixes}"
