"""How experts are trained: the shared one alone first, then the others around it.

Stage 1 makes a floor: what the network is worth when no other expert is visited. Stage 2 brings the
others back, with the shared one as it is, and keeps them all in use.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from ...ir.program import Program
from ...ir.recognize import Experts, Layer
from ...ir.recognize.place import Place
from ...ir.regions import Region
from .losses import balance, balanced_features, output_mse
from .recovery import Loss, Stage, Values

BALANCE = 0.01


def stages(old: Program, new: Program, labels: Collection[str]) -> Sequence[Stage]:
    """Return the training of networks that were converted.

    Args:
        old: The teacher.
        new: The student.
        labels: Which networks of it were converted.

    Source: Zheng et al., Dense2MoE, 2025, arXiv:2510.09094, sections on stages 1 and 2.
    """
    found = [region for region in new.regions(Experts) if region.label in labels]
    narrow = [ffn for ffn in new.feed_forwards() if ffn.label in labels]
    shared = [name for r in found for name in _names(r, r.layers)]
    shared += [name for ffn in narrow for name in _names(ffn, ffn.layers)]
    loss = balanced_features(output_mse(old, new), features(new), features(old))
    result: list[Stage] = []
    if shared:
        silent = {r.tensor_name(r.slots["down"]): nothing(r.weights()["down"]) for r in found}
        weights = dict.fromkeys(shared)
        result.append(Stage(name="shared experts", weights=weights, loss=loss, held=silent))
    if found:
        weights = dict.fromkeys(name for region in found for name in _routed(region))
        routers = [region for region in found if region.is_weighted and region.router]
        if routers:
            loss = loss + BALANCE * even_use(routers)
        result.append(Stage(name="routed experts", weights=weights, loss=loss))
    return result


def even_use(experts: Sequence[Experts]) -> Loss:
    """Return the mean over routers of n * sum_i f_i P_i, scores taken as shares of their sum.

    Source: Fedus, Zoph and Shazeer, 2022, arXiv:2101.03961, equations 4 to 6.
    """
    count = len(experts)
    places = [Place(r.instance, r.scores) for r in experts if r.scores]
    places += [Place(r.instance, r.index) for r in experts]

    def measure(ours: Values, _: Values) -> Tensor:
        shares = [scores / scores.sum(dim=-1, keepdim=True) for scores in ours[:count]]
        used = [balance(p, index) for p, index in zip(shares, ours[count:], strict=True)]
        return torch.stack(used).mean()

    return Loss(tuple(places), (), measure)


def features(program: Program) -> list[Place]:
    """Return what every block gives to its streams."""
    return [
        Place(block.instance, stream.stream_out)
        for block in program.blocks()
        for stream in block.streams
        if stream.stream_out is not None
    ]


def nothing(like: Tensor) -> Tensor:
    """Return zeros that take no memory."""
    return like.new_zeros(()).expand(like.shape)


def _names(region: Region, layers: Sequence[Layer]) -> Iterator[str]:
    slots = (slot for layer in layers for slot in (layer.weight_node, layer.bias_node))
    return (region.tensor_name(slot) for slot in slots if slot is not None)


def _routed(region: Experts) -> Iterator[str]:
    """Yield the weights of routed experts, and of a router that its gates are made of."""
    yield from (region.tensor_name(slot) for slot in region.slots.values())
    if region.is_weighted and region.router:
        yield from _names(region, (region.router,))
