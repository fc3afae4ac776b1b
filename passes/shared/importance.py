"""How much each head and each hidden neuron matters to the model.

    magnitude     sqrt(sum w ** 2)                   over all weights of the unit
    taylor        sum over samples, sum |w * dL/dw|  over all weights of the unit
    activation    sum mean |x_c| * |W[:, c]|         over the columns c that read the unit
    random        uniform                            what every other score is compared with

    scores = neuron_importance(program.feed_forwards(), "taylor", calibration)
    scores["blocks.0.mlp"]                           [ffn_dim]

Scores are summed over calibration inputs as they come: memory does not grow with their number.

L is the judged loss where calibration comes with targets. Without, it is the output of each sample
times random signs r: E[(r . J w)^2] = |J w|^2 is the squared distance by which the outputs move, to
first order, when the weight goes. The distance itself has no gradient at the old weights.

Source: Molchanov et al., 2019, arXiv:1906.10771, equation 8 (taylor, here weight by weight);
    Sun et al., 2023, arXiv:2306.11695, equation 1 (activation times weight).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx

from ...ir.errors import OptionError
from ...ir.graphs import place_of
from ...ir.recognize import FeedForward
from ...ir.recognize.coupled import Coupled, Share, coupled_neurons
from ...ir.run import run
from ...ir.taps import outputs_of, tapped
from ..base import Calibration, Judged

Scores = dict[str, Tensor]  # by region label, one number per unit, in fp32


def neuron_importance(
    ffns: Sequence[FeedForward], method: str, calibration: Calibration = (), *, seed: int = 0
) -> Scores:
    """Score the hidden neurons of feed-forward networks of one program.

    Args:
        ffns: The networks; their weights must be plain matrices.
        method: A key of `METHODS`.
        calibration: Flat inputs, perhaps with targets; `taylor` and `activation` need some.
        seed: For `random`, and for the signs of `taylor` without targets.

    Returns:
        [ffn_dim] scores by the label of each network.

    Raises:
        OptionError: There is no calibration, or it gives scores that are no numbers.
    """
    return importance([coupled_neurons(ffn) for ffn in ffns], method, calibration, seed=seed)


def importance(
    coupled: Sequence[Coupled], method: str, calibration: Calibration = (), *, seed: int = 0
) -> Scores:
    """Score units of regions of one program; arguments as in `neuron_importance`."""
    if not coupled:
        return {}
    scores = METHODS[method](coupled, calibration, seed)
    for label, found in scores.items():
        if not found.isfinite().all():
            raise OptionError(
                f"the {method} scores of {label} are no numbers.",
                where="the calibration",
                remedy="leave out inputs on which the model gives NaN or infinity.",
            )
    return scores


def _random(coupled: Sequence[Coupled], calibration: Calibration, seed: int) -> Scores:
    def drawn(c: Coupled) -> Tensor:
        own = zlib.crc32(c.region.label.encode())  # a region draws alike, whatever it stands among
        return torch.rand(c.count, generator=torch.Generator().manual_seed(seed + own))

    return {c.region.label: drawn(c) for c in coupled}


def _magnitude(coupled: Sequence[Coupled], calibration: Calibration, seed: int) -> Scores:
    if any(c.region.tensor(share.slot).is_meta for c in coupled for share in c.shares):
        raise OptionError(
            "weights on the meta device have no magnitude.",
            remedy='score by "random", or load the weights.',
        )

    def squares(c: Coupled, share: Share) -> Tensor:
        return _along(c.region.tensor(share.slot).float().square(), share.axis)

    return {
        c.region.label: sum_by_unit(c, {s: squares(c, s) for s in c.shares}).sqrt() for c in coupled
    }


def _activation(coupled: Sequence[Coupled], calibration: Calibration, seed: int) -> Scores:
    """Sum over the columns that read a unit: mean size of the input times norm of the column."""
    reads = {(c.region.instance, s.value): (c, s) for c in coupled for s in c.shares if s.value}
    sizes: dict[tuple[str | None, fx.Node | None], Tensor] = {}
    counts: dict[tuple[str | None, fx.Node | None], int] = dict.fromkeys(reads, 0)

    def see(instance: str | None, node: fx.Node, value: Tensor) -> None:
        key = instance, node
        if key in reads:
            owner, share = reads[key]
            axis = owner.axes[node].index(share.units)
            sizes[key] = sizes.get(key, 0) + _along(value.abs().float(), axis)
            counts[key] += value.numel() // len(share.units)

    for inputs in calibration:
        run(coupled[0].region.program, inputs, on_node=see)
    _require_some(bool(sizes))

    def weighed(c: Coupled, share: Share) -> Tensor:
        key = c.region.instance, share.value
        if key not in sizes:
            raise OptionError(
                "it computes nothing on the calibration inputs.",
                where=c.region.label,
                remedy="run the pass before the one that makes the model choose what to compute.",
            )
        columns = _along(c.region.tensor(share.slot).float().square(), share.axis).sqrt()
        return sizes[key] / counts[key] * columns

    return {
        c.region.label: sum_by_unit(c, {s: weighed(c, s) for s in c.shares if s.value})
        for c in coupled
    }


@torch.enable_grad()
def _taylor(coupled: Sequence[Coupled], calibration: Calibration, seed: int) -> Scores:
    program = coupled[0].region.program
    module = tapped(program, outputs_of(program))
    held = dict((*module.named_parameters(), *module.named_buffers()))
    paths = {place_of(tensor): path for path, tensor in held.items()}
    names = {paths[place_of(program.tensors[n])]: n for c in coupled for n in map(c.name, c.shares)}
    leaves = {path: program.tensors[n].detach().requires_grad_() for path, n in names.items()}
    totals = {c.region.label: torch.zeros(c.count) for c in coupled}
    seen = False
    for losses in _losses(module, leaves, calibration, seed):
        if not losses.requires_grad:
            raise OptionError(
                "the outputs on the calibration inputs do not depend on the weights in question.",
                where=coupled[0].region.label,
                remedy="run the pass before the one that makes the model choose what to compute.",
            )
        for loss in losses:
            found = torch.autograd.grad(
                loss, list(leaves.values()), retain_graph=True, materialize_grads=True
            )
            products = {
                names[path]: (weight.detach() * slope).abs().float()
                for (path, weight), slope in zip(leaves.items(), found, strict=True)
            }
            for c in coupled:
                parts = {s: _along(products[c.name(s)], s.axis) for s in c.shares}
                totals[c.region.label] += sum_by_unit(c, parts)
            seen = True
    _require_some(seen)
    return totals


def _losses(
    module: fx.GraphModule, leaves: Mapping[str, Tensor], calibration: Calibration, seed: int
) -> Iterator[Float[Tensor, " batch"]]:
    """Yield the losses of the samples of each set of inputs."""
    generator = torch.Generator().manual_seed(seed)

    def call(inputs: Sequence[Tensor]) -> Any:
        return torch.func.functional_call(module, dict(leaves), tuple(inputs))

    if isinstance(calibration, Judged):
        for inputs, target in calibration.pairs():
            yield calibration.loss(call(inputs), target)
    else:
        for inputs in calibration:
            yield _signed(call(inputs), generator)


def _signed(outputs: Sequence[Tensor], generator: torch.Generator) -> Float[Tensor, " batch"]:
    """Return the sum of each sample's outputs, each with a random sign."""
    floats = [y for y in outputs if y.is_floating_point() and y.dim()]
    batch = floats[0].shape[0]
    total = torch.zeros(batch)
    for y in floats:
        if y.shape[0] == batch:
            signs = torch.randint(0, 2, y.shape, generator=generator) * 2 - 1
            total = total + (y * signs).flatten(1).sum(1) if y.dim() > 1 else total + y * signs
    return total


def sum_by_unit(coupled: Coupled, parts: Mapping[Share, Float[Tensor, " positions"]]) -> Tensor:
    """Add up what shares of weights have for each position, unit by unit."""
    totals = torch.zeros(coupled.count + 1)
    for share, part in parts.items():
        units = torch.tensor(share.units) % (coupled.count + 1)  # what belongs to none comes last
        totals.index_add_(0, units, part)
    return totals[:-1]


def _require_some(seen: bool) -> None:
    if not seen:
        raise OptionError(
            "scores are taken from calibration inputs, and there are none.",
            remedy='give calibration=..., or score by "magnitude".',
        )


def _along(values: Tensor, axis: int) -> Float[Tensor, " positions"]:
    """Sum over all axes but one."""
    return values.movedim(axis, 0).flatten(1).sum(1) if values.dim() > 1 else values


METHODS: Mapping[str, Callable[[Sequence[Coupled], Calibration, int], Scores]] = {
    "magnitude": _magnitude,
    "taylor": _taylor,
    "activation": _activation,
    "random": _random,
}
