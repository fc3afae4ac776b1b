"""How close blocks are to linear maps, one by one and in a row.

    probe of block i, per stream:   h_i ~ h_(i-1) + l_i(h_(i-1))        fitted to the calibration
    similarity of blocks u+1 to k:  CKA of (1 + l_k)(...)(1 + l_(u+1)) h_u with h_k

Two passes over the calibration, one set in memory at a time: one to fit, one to compare.

Source: Ma et al., PPCL, 2025, arXiv:2511.16156 (probes); Kornblith et al., 2019, arXiv:1905.00414
    (linear CKA); Nguyen et al., 2021, arXiv:2010.15327 (its terms summed over batches).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ...ir.recognize.stack import Stack
from ...ir.taps import tapped
from ..base import Calibration
from .least_squares import residual_fits

Cut = Sequence[Tensor | None]  # the streams at one place, None for one that has ended
Map = tuple[Tensor, Tensor]  # weight and bias


@dataclass(frozen=True)
class Probes:
    """What probes have found in a stack.

    Attributes:
        errors: Per block and stream, the error of its probe relative to what the block adds.
        similarity: Per block u, the similarity of u with itself (1), u+1, u+2, ... to the last.
    """

    errors: list[list[float]]
    similarity: list[list[float]]


def probe(stack: Stack, calibration: Calibration) -> Probes:
    """Fit a probe to every block and stream of a stack, and compare rows of them with the blocks.

    Raises:
        OptionError: There are no calibration inputs, or activations are not finite.
    """
    rows = [list(zip(*cuts, strict=True)) for cuts in pairwise(stack.cuts)]
    ends = [(a, b) for row in rows for a, b in row if a and b]
    fits = iter(residual_fits(stack.program, ends, calibration))
    found = [[next(fits) if a and b else None for a, b in row] for row in rows]
    maps = [[fit.solve() if fit else None for fit in row] for row in found]
    errors = [
        [fit.error(*best) for fit, best in zip(*pair, strict=True) if fit and best]
        for pair in zip(found, maps, strict=True)
    ]
    return Probes(errors, _similarity(stack, calibration, maps))


def _similarity(
    stack: Stack, calibration: Calibration, maps: Sequence[Sequence[Map | None]]
) -> list[list[float]]:
    """Return what `Probes.similarity` holds."""
    depth, streams = len(maps), len(stack.cuts[0])
    terms = torch.zeros(depth, depth, streams, 3, dtype=torch.float64)
    for cuts in _values(stack, calibration):
        for start in range(depth):
            proxies = list(cuts[start + 1])
            for stop in range(start + 1, depth):
                for stream, (proxy, found) in enumerate(zip(proxies, maps[stop], strict=True)):
                    if proxy is not None:
                        proxy = proxy.double()
                        proxies[stream] = None if found is None else proxy + F.linear(proxy, *found)
                    truth = cuts[stop + 1][stream]
                    if (proxy := proxies[stream]) is not None and truth is not None:
                        terms[start, stop, stream] += alignment_terms(proxy, truth)
    alike = terms[..., 0] / (terms[..., 1] * terms[..., 2]).sqrt()
    known = terms[..., 1] > 0
    mean = torch.where(known, alike, 0).sum(-1) / known.sum(-1).clamp_min(1)
    return [[1.0, *mean[start, start + 1 :].tolist()] for start in range(depth)]


def alignment_terms(
    x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch other"]
) -> Float[Tensor, "3"]:
    """Return |Y'X|^2, |X'X|^2 and |Y'Y|^2 of centred values.

    CKA is the first over the root of the product of the others.
    """
    x, y = (value.flatten(0, -2).double() for value in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    pairs = ((y, x), (x, x), (y, y))
    return torch.stack([(a.T @ b).square().sum() for a, b in pairs])


def _values(stack: Stack, calibration: Calibration) -> Iterator[list[Cut]]:
    """Yield the streams at every cut, for each set of inputs."""
    module = tapped(stack.program, [place for cut in stack.cuts for place in cut if place])
    for inputs in calibration:
        with torch.no_grad():
            values = iter(module(*inputs))
        yield [[next(values) if place else None for place in cut] for cut in stack.cuts]
