"""Groups of equal size of vectors that are alike: k-means in which every group is full.

Vectors bid for places in the groups, each for the one that suits it best at the prices of the
moment. A full group keeps those who bid most and raises its price. The end is within
`len(x) * step` of the best sum of similarities.

Source: Bertsekas and Castanon, 1989, "The auction algorithm for the transportation problem";
    Bradley et al., 2000, "Constrained k-means clustering", MSR-TR-2000-65.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

ROUNDS = 50  # of assigning vectors and moving centres
STEP = 1e-3  # smallest raise of a price, relative to how far similarities differ


def balanced_clusters(
    x: Float[Tensor, "vectors dim"], groups: int, *, seed: int = 0
) -> list[list[int]]:
    """Return groups of equal size of vectors that point the same way.

    Args:
        x: Vectors; their lengths do not matter.
        groups: How many; it must divide the number of vectors.
        seed: Draws the first centres, far from each other.

    Returns:
        Positions of the vectors in each group, in order; groups by their first vector.
    """
    x = F.normalize(x.double(), dim=-1)
    size = len(x) // groups
    centres = x[_apart(x, groups, seed)]
    owner, prices = torch.full((len(x),), -1), x.new_zeros(groups)
    for _ in range(ROUNDS):
        before, owner = owner, assigned(x @ centres.T, size, prices)
        if torch.equal(before, owner):
            break
        centres = torch.stack([x[owner == group].mean(dim=0) for group in range(groups)])
    return sorted((owner == group).nonzero()[:, 0].tolist() for group in range(groups))


def assigned(
    likeness: Float[Tensor, "vectors groups"], size: int, prices: Float[Tensor, " groups"]
) -> Int[Tensor, " vectors"]:
    """Return the group of each vector, `size` of them in each, by auction.

    Args:
        likeness: What a vector gains by a place in a group.
        size: Places in each group.
        prices: Where bidding begins, any will do; in the end those at which places were sold.

    Raises:
        ValueError: Vectors are not `size` times as many as groups.
    """
    count, groups = likeness.shape
    if count != size * groups:
        raise ValueError(f"{count} vectors do not fill {groups} groups of {size}.")
    if groups == 1:
        return torch.zeros(count, dtype=torch.int64)
    step = STEP * max(float(likeness.max() - likeness.min()), 1e-9)
    owner = torch.full((count,), -1)
    bids = likeness.new_zeros(count)
    while bool((owner < 0).any()):
        free = (owner < 0).nonzero()[:, 0]
        best, group = (likeness[free] - prices).topk(2, dim=1)
        owner[free] = group[:, 0]
        bids[free] = prices[group[:, 0]] + best[:, 0] - best[:, 1] + step
        for full in group[:, 0].unique().tolist():
            prices[full] = _outbid(owner, bids, full, size, float(prices[full]))
    return owner


def _outbid(owner: Tensor, bids: Tensor, group: int, size: int, price: float) -> float:
    """Keep those of a group who bid most, send the rest away, and return the price of a place."""
    members = (owner == group).nonzero()[:, 0]
    if len(members) < size:
        return price
    ranked = members[bids[members].argsort(descending=True, stable=True)]
    owner[ranked[size:]] = -1
    return float(bids[ranked[size - 1]])


def _apart(x: Float[Tensor, "vectors dim"], count: int, seed: int) -> list[int]:
    """Draw vectors, each with a chance that grows with its distance from those drawn before.

    Source: Arthur and Vassilvitskii, 2007, "k-means++", section 2.2.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    while len(chosen) < count:
        distance = (1 - (x @ x[chosen].T).amax(dim=1)).clamp_min(1e-12)
        distance[chosen] = 0
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return chosen
