"""From experts back to the dense network they are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.errors import OptionError
from ...ir.program import Program
from ...ir.recognize import Experts
from ...ir.rewrite import rewrite
from ..plan import Plan
from .moe import Split, check
from .neurons import Network, Neurons, beside

NAME = "to-dense"


def to_dense(program: Program, plan: Plan[Split] | None = None) -> Program:
    """Return a program whose networks in experts are dense again, routers and gates left out.

    It computes what all experts together do with gates of one.

    Args:
        program: Where the experts are, perhaps trained since.
        plan: The plan that made them. With it every neuron is back in its place, and weights that
            were not trained are the model's own, bit by bit; without it, neurons stay in the order
            of the experts.

    Raises:
        OptionError: There are no experts, or the plan is not one of them.
    """
    found = program.regions(Experts)
    if not found:
        raise OptionError(
            "the program has no feed-forward network in experts.",
            remedy="networks of which active=0 experts were kept have lost their other neurons.",
        )
    splits = plan.decisions if plan else {}
    changes = [
        (region, beside(region, Network(neurons_of(region, splits.get(region.label)))))
        for region in found
    ]
    return rewrite(program, changes, by=NAME)


def neurons_of(region: Experts, split: Split | None = None) -> Neurons:
    """Return all neurons of a network in experts: the shared ones first, or as a split has them."""
    routed = region.weights()
    gate, up, down = region.shared_gate, region.shared_up, region.shared_down
    shared: dict[str, Tensor | None] = {
        "gate": gate.weight if gate else None, "gate_bias": gate.bias if gate else None,
        "up": up.weight if up else None, "up_bias": up.bias if up else None,
    }  # fmt: skip
    rows = {n: _joined(shared[n], routed[n].flatten(0, 1)) for n in shared if n in routed}
    columns = routed["down"].movedim(0, 1).flatten(1)  # [dim, experts * ffn_dim]
    bias = down.bias if down else None
    if region.bias is not None:
        bias = region.tensor(region.bias) if bias is None else bias + region.tensor(region.bias)
    neurons = Neurons(
        **rows,
        down=columns if down is None else torch.cat([down.weight, columns], dim=1),
        down_bias=bias,
        activation=region.activation,
    )
    if split is None:
        return neurons
    check(split, len(neurons.up))
    places = sorted(range(len(split.order)), key=split.order.__getitem__)
    return neurons.take(places)


def _joined(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else torch.cat([first, second])
