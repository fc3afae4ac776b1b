"""Take a block out of its stack: its streams pass by."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from ...ir.recognize import Block
from ...ir.shapes import describe


class Bypass(nn.Module):
    """Return some of the inputs and compute nothing."""

    def __init__(self, picks: Sequence[int]) -> None:
        super().__init__()
        self.picks = tuple(picks)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        picked = tuple(inputs[index] for index in self.picks)
        return picked if len(picked) > 1 else picked[0]


def bypass(block: Block) -> Bypass:
    """Return what stands in the place of a block that is dropped; ask `cannot_bypass` first."""
    return Bypass([block.inputs.index(stream.stream_in) for stream in block.streams])


def cannot_bypass(block: Block) -> str | None:
    """Say why the model cannot do without a block, or None.

    Returns:
        A reason that completes the sentence "the block ...".
    """
    for number, stream in enumerate(block.streams):
        if stream.stream_out is None:
            return f"ends the stream {stream.stream_in.name}"
        if stream.stream_in not in block.inputs:
            return f"computes the beginning of its stream {number} itself"
        before, after = (describe(n.meta["val"]) for n in (stream.stream_in, stream.stream_out))
        if before != after:
            return f"changes its stream {number} from {before} to {after}"
    others = block.outputs[len(block.streams) :]
    if others:
        return f"computes {others[0].name}, which is read outside of it"
    return None


def entangled(blocks: Sequence[Block]) -> dict[str, str]:
    """Return the blocks that compute something together with one before, each with the reason."""
    owner: dict[tuple[str | None, fx.Node], str] = {}
    found: dict[str, str] = {}
    for block in blocks:
        for node in block.nodes:
            other = owner.setdefault((block.instance, node), block.label)
            if other != block.label:
                found[block.label] = f"computes {node.name} together with {other}"
    return found
