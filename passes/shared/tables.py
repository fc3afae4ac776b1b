"""Tables that a dense layer is read into: what the row of a code answers.

    T_k[c] = W_k p_k[c]            W_k: [out_features, bits], the columns of a chunk

    conditional_mean       p = E[z | c] / E[score | c]
    least_squares          p = E[score z | c] / E[score^2 | c]        best of |W_k z - score T_k[c]|
    no input of code c     p = a t_c / score(a t_c)                   a: mean |z|, t_c: signs of c

One score has to say how long all elements of a chunk are, so the error grows with their number.

Source: Ding et al., MemoryFormer, 2024, arXiv:2411.12992 (the layer).
Differs: the paper trains from random tables; beginning at a dense layer is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from ...ir.errors import OptionError
from ...ir.ops.hashing import chunks, hashed, rows_of
from ...ir.program import Program
from ...ir.recognize import Linear, Place
from ...ir.recognize.readers import Readers
from ...ir.taps import tapped
from ..base import Calibration
from .hashed import HashedLayer

FITS: Final = ("conditional_mean", "least_squares")
TINY: Final = 1e-12


class RowSums:
    """Sums over the inputs of a layer, one for each row of its tables.

    Args:
        count: Tables.
        bits: Elements of a chunk.
        score: A kind of score.
        fit: One of `FITS`.
    """

    def __init__(self, count: int, bits: int, score: str, fit: str) -> None:
        self.count, self.bits, self.score, self.fit = count, bits, score, fit
        self.above = torch.zeros(count * 2**bits, bits, dtype=torch.float64)
        self.below = self.above.new_zeros(len(self.above))
        self.samples, self.size = 0, 0.0

    def add(self, x: Float[Tensor, "*batch dim"]) -> None:
        """Take in some inputs."""
        x = x.flatten(0, -2).double().cpu()
        z = chunks(x, self.bits).flatten(0, 1)  # [samples * tables, bits]
        code, score = hashed(x, self.bits, self.score)
        row, score = rows_of(code, self.bits).flatten(), score.flatten()
        share = score if self.fit == "least_squares" else torch.ones_like(score)
        self.above.index_add_(0, row, share[:, None] * z)
        self.below.index_add_(0, row, share * score)
        self.samples, self.size = self.samples + len(x), self.size + float(x.abs().mean(1).sum())

    def prototypes(self) -> Float[Tensor, "tables rows bits"]:
        """Return p; ask only after some inputs."""
        signs = sign_prototypes(self.bits, self.score, self.size / self.samples)
        below = self.below[:, None]
        fitted = self.above / below.clamp_min(TINY)
        found = torch.where(below > TINY, fitted, signs.repeat(self.count, 1))
        return found.unflatten(0, (self.count, -1))


def sign_vectors(bits: int) -> Float[Tensor, "rows bits"]:
    """Return the vector of ones and minus ones that each code stands for."""
    code, places = torch.arange(2**bits), torch.arange(bits - 1, -1, -1)
    return 2.0 * (code[:, None] >> places & 1).double() - 1


def sign_prototypes(bits: int, score: str, size: float) -> Float[Tensor, "rows bits"]:
    """Return p for inputs all of one size, alike in every chunk."""
    vectors = max(size, TINY) * sign_vectors(bits)
    _, weight = hashed(vectors, bits, score)
    return vectors / weight


def tables_of(
    weight: Float[Tensor, "out_features in_features"],
    prototypes: Float[Tensor, "tables rows bits"],
) -> Float[Tensor, "tables rows out_features"]:
    """Return the tables that answer as a dense layer does at the prototypes."""
    parts = weight.unflatten(1, (len(prototypes), -1)).permute(1, 2, 0)  # [tables, bits, out]
    answers = prototypes.to(parts.device) @ parts.double()
    return answers.to(weight.dtype)


def dense_layer(layer: Linear, sums: RowSums, score: str) -> HashedLayer:
    """Return tables that begin at a dense layer, and its bias.

    Raises:
        OptionError: The weight holds NaN or infinity.
    """
    weight, bias = layer.weight, layer.bias
    if not bool(weight.isfinite().all()):
        raise OptionError(
            f"the weight {layer.tensor_name(layer.weight_node)!r} holds NaN or infinity, which no"
            " table can begin with.",
            where=layer.label,
            remedy="repair it, leave it out with exclude=..., or begin with init=random.",
        )
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return HashedLayer(tables_of(weight, sums.prototypes()), bias, score, [len(weight)])


def row_sums(
    program: Program,
    regions: Sequence[Readers],
    calibration: Calibration,
    bits: int,
    score: str,
    fit: str,
) -> list[RowSums]:
    """Return the sums over what layers of a program read.

    Raises:
        OptionError: There are no inputs, or layers read NaN or infinity.
    """
    module = tapped(program, [Place(region.instance, region.inputs[0]) for region in regions])
    widths = [region.linears[0].weight.shape[1] for region in regions]
    sums = [RowSums(width // bits, bits, score, fit) for width in widths]
    for inputs in calibration:
        with torch.no_grad():
            values = module(*inputs)
        for region, one, value in zip(regions, sums, values, strict=True):
            if not bool(value.isfinite().all()):
                raise OptionError(
                    f"what {region.label} reads is NaN or infinite on the calibration.",
                    where=region.label,
                    remedy="leave out the batch that makes it so, or repair the model.",
                )
            one.add(value)
    if not all(one.samples for one in sums):
        raise OptionError(
            "tables are fitted to calibration inputs, and there are none.",
            remedy="give calibration=..., or begin with init=random.",
        )
    return sums
