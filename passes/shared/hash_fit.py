"""How hash functions are learned: supervised hashing of a layer's own attention map.

    S = 1 for the most similar keys of a query, -1 for the least, 0 between
    A = argmin |bits * S - H_q @ H_k.T|^2          bit by bit, each on what those before have left

Source: Liu et al., EcoFormer, 2022, arXiv:2209.09004; Liu et al., Supervised hashing with kernels,
    CVPR 2012.
Differs: a bit is given up head by head, and its rate is large enough to learn: with the released
    one, 5e-4, codes stay where they began. Queries and keys may differ; where they do not, this is
    the released objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .cores import heads_of
from .hashing import Hash, features

Features = Float[Tensor, "batch heads seq anchors"]


@dataclass(frozen=True)
class HashFit:
    """How a hash function is learned.

    Attributes:
        bits: Bits of a code.
        anchors: Tokens that others are compared with.
        neighbours: Keys of a query that count as similar, and as many as dissimilar.
        start: `random` planes, or the `eigen`vectors of the residual between features.
        steps: Of gradient descent, per bit; 0 keeps the start.
        rate: Of the descent.
        seed: Draws anchors and planes.
    """

    bits: int
    anchors: int
    neighbours: int
    start: str
    steps: int
    rate: float
    seed: int

    def __call__(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
    ) -> Hash:
        """Learn from the queries and keys of one batch."""
        generator = Generator().manual_seed(self.seed)
        query, key = query.float(), heads_of(query, key).float()
        tokens = F.normalize(key, dim=-1).transpose(1, 2).flatten(0, 1)  # [batch * keys, heads, _]
        chosen = torch.randperm(len(tokens), generator=generator)[: self.anchors]
        anchors = tokens[chosen.to(tokens.device)].transpose(0, 1).contiguous()
        together = features(torch.cat((query, key), dim=2), anchors)
        means = together.mean((0, 2)).unsqueeze(1)
        ours, theirs = (together - means).split([query.shape[2], key.shape[2]], dim=2)
        target = similarity(query, key, self.neighbours)
        planes = self._planes(ours, theirs, self.bits * target, generator)
        return Hash(anchors, means, planes)

    def _planes(self, query: Features, key: Features, residual: Tensor, draw: Generator) -> Tensor:
        heads, anchors = query.shape[1], query.shape[-1]
        drawn = torch.randn(self.bits, heads, anchors, generator=draw).to(query.device)
        found: list[Tensor] = []
        for first in drawn:
            start = leading(query, key, residual) if self.start == "eigen" else first
            plane = self._descend(query, key, residual, start)
            found.append(plane)
            residual = residual - outer(signs(query, plane), signs(key, plane))
        return torch.stack(found, dim=1)

    def _descend(self, query: Features, key: Features, residual: Tensor, start: Tensor) -> Tensor:
        """Return a better plane for each head, or the one given where none was found."""
        if not self.steps:
            return start
        plane = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([plane], self.rate, momentum=0.9, nesterov=True)
        scale = residual.shape[-2] * self.bits
        with torch.enable_grad():
            for _ in range(self.steps):
                ours, theirs = (soft_signs(x, plane) for x in (query, key))
                loss = -agreement(ours, theirs, residual).sum() / scale
                (plane.grad,) = torch.autograd.grad(loss, plane)
                optimizer.step()
        after = plane.detach()
        gains = [agreement(signs(query, p), signs(key, p), residual) for p in (start, after)]
        return torch.where((gains[1] > gains[0])[:, None], after, start)


def similarity(
    query: Float[Tensor, "*batch queries head_dim"],
    key: Float[Tensor, "*batch keys head_dim"],
    neighbours: int,
) -> Float[Tensor, "*batch queries keys"]:
    """Return 1 for the most similar keys of each query, -1 for the least, 0 for the others."""
    scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT
    target = torch.zeros_like(scores)
    for sign, largest in ((1.0, True), (-1.0, False)):
        target.scatter_(-1, scores.topk(neighbours, dim=-1, largest=largest).indices, sign)
    return target


def signs(x: Features, plane: Float[Tensor, "heads anchors"]) -> Float[Tensor, "batch heads seq"]:
    """Return one bit of each token."""
    side = (x @ plane.unsqueeze(-1)).squeeze(-1)
    return torch.where(side >= 0, 1.0, -1.0)


def soft_signs(x: Features, plane: Float[Tensor, "heads anchors"]) -> Tensor:
    """Return numbers between -1 and 1 that have the signs of one bit, and gradients."""
    return 2 * (x @ plane.unsqueeze(-1)).squeeze(-1).sigmoid() - 1


def agreement(query: Tensor, key: Tensor, residual: Tensor) -> Float[Tensor, " heads"]:
    """Return q' R k of one bit, averaged over the batch."""
    return (query.unsqueeze(-1) * (residual @ key.unsqueeze(-1))).sum((-2, -1)).mean(0)


def outer(query: Tensor, key: Tensor) -> Tensor:
    """Return the similarity that one bit gives."""
    return query.unsqueeze(-1) * key.unsqueeze(-2)


def leading(query: Features, key: Features, residual: Tensor) -> Float[Tensor, "heads anchors"]:
    """Return a where a' K_q' R K_k a is largest for its a' (K_q' K_q + K_k' K_k) a."""
    cross = (query.mT @ residual @ key).mean(0)
    gram = (query.mT @ query + key.mT @ key).mean(0)
    ridge = 1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-9
    root = torch.linalg.cholesky(gram + ridge * torch.eye(gram.shape[-1], device=gram.device))
    white = torch.linalg.solve_triangular(root, cross + cross.mT, upper=False)
    white = torch.linalg.solve_triangular(root, white.mT, upper=False)
    top = torch.linalg.eigh((white + white.mT) / 2).eigenvectors[..., -1:]
    plane = torch.linalg.solve_triangular(root.mT, top, upper=True).squeeze(-1)
    size = (query @ plane.unsqueeze(-1)).square().mean((0, 2)).sqrt()
    return plane / size.clamp_min(1e-9)
