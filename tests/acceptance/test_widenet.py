"""WideNet: what private norms, experts and the balance loss are worth on the digits."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import pytest
import torch
from torch import Tensor

from blockwright.driver.zoo import find_preset
from blockwright.models.widenet import WideViT, WideViTConfig, choices
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys import data
from blockwright.testing.toys.vision import reading_quality
from blockwright.testing.toys.wide import routes_of, wide

pytestmark = pytest.mark.acceptance
SEEDS = 0, 1


def average(measure: Callable[[WideViT], float], **changes: object) -> float:
    return mean(measure(wide(seed=seed, **changes)) for seed in SEEDS)


def loss(model: WideViT) -> float:
    _, held = data.digits()
    with torch.no_grad():
        return reading_quality(model, held)["cross_entropy"]


def held_routes(model: WideViT) -> Tensor:
    return routes_of(model, data.digits()[1].images)


def usage_entropy(model: WideViT) -> float:
    """The mean over blocks of the entropy of which experts are chosen, in nats."""
    shares = [choices(route, 2).double().mean(0) / 2 for route in held_routes(model)]
    return mean(torch.special.entr(share).sum().item() for share in shares)


def keeping(model: WideViT) -> float:
    """The fraction of tokens whose likeliest expert is the same in all blocks."""
    best = held_routes(model).argmax(-1)
    return (best == best[0]).all(0).double().mean().item()


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_private_norms(acceptance: Acceptance) -> None:
    private, shared = average(loss), average(loss, private_norms=False)
    more = average(parameters) / average(parameters, private_norms=False) - 1
    acceptance(
        "widenet",
        1,
        "Norms of its own in every block lower the loss, for less than 2% more parameters.",
        naive="norms shared like the other layers",
        figure=f"{private:.4f} against {shared:.4f} nats, {more:+.2%} parameters; mean of 2 seeds",
        holds=private < shared and more < 0.02,
    )
    assert more < 0.02
    assert max(private, shared) < 0.4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_shared_experts(acceptance: Acceptance) -> None:
    experts, dense = average(loss), average(loss, experts=1)
    acceptance(
        "widenet",
        2,
        "Four shared experts, two per token, lower the loss.",
        naive="one shared feed-forward network of the same width",
        figure=f"{experts:.4f} against {dense:.4f} nats; mean of 2 seeds",
        holds=experts < dense,
    )
    assert experts < 0.4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_balance_loss(acceptance: Acceptance) -> None:
    with_, without = average(usage_entropy), average(usage_entropy, balance=0.0)
    acceptance(
        "widenet",
        4,
        "The balance loss spreads tokens over experts.",
        naive="no balance loss",
        figure=f"entropy of use {with_:.4f} against {without:.4f} nats of 1.3863; mean of 2 seeds",
        holds=with_ > without,
    )
    assert 0 < with_ <= 1.3864


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_routing_differs_with_depth(acceptance: Acceptance) -> None:
    private, shared = average(keeping), average(keeping, private_norms=False)
    acceptance(
        "widenet",
        5,
        "With norms of their own blocks send a token to different experts, with shared norms less.",
        naive="norms shared like the other layers",
        figure=f"{private:.1%} against {shared:.1%} of tokens keep their first expert in all blocks"
        "; mean of 2 seeds",
        holds=private < 0.9 and private < shared,
    )
    assert 0 <= private <= 1


def test_parameters_are_those_of_the_closed_form(acceptance: Acceptance) -> None:
    config = WideViTConfig(image=8, patch=4, channels=1, classes=10, dim=32, heads=4, depth=6,
                           ffn_dim=64)  # fmt: skip
    d, f, experts, depth = config.dim, config.ffn_dim, config.experts, config.depth
    layers = 4 * (d**2 + d) + experts * (2 * d * f + f + d) + experts * d
    ends = (16 * d + d) + 5 * d + 2 * d + (d**2 + d) + (10 * d + 10)
    shared = parameters(WideViT(config))
    assert shared == layers + 4 * d * depth + ends
    unshared = shared + (depth - 1) * layers
    acceptance(
        "widenet",
        3,
        "Six blocks that share their layers have less than a third of the parameters.",
        naive="six blocks with layers of their own",
        figure=f"{shared:,} against {unshared:,}; the closed form to the digit",
        holds=shared < unshared / 3,
    )
    assert shared < unshared / 3


def test_published_sizes(acceptance: Acceptance) -> None:
    counts = []
    for name in ("widenet-b", "widenet-l", "widenet-h", "vit-b/16"):
        preset = find_preset(name)
        assert preset is not None
        counts.append(preset.parameters)
    *wide_counts, dense = counts
    assert wide_counts == [29_690_600, 40_941_544, 63_341_800]
    acceptance(
        "widenet",
        6,
        "Published sizes: 29 M, 40 M, 63 M, the last two 0.46 and 0.72 times those of ViT-B/16.",
        naive="ViT-B/16",
        figure=", ".join(f"{count / 1e6:.1f} M ({count / dense:.3f})" for count in wide_counts)
        + f" against {dense / 1e6:.1f} M",
        holds=all(
            abs(count / dense - ratio) < 0.02
            for count, ratio in zip(wide_counts[1:], (0.46, 0.72), strict=True)
        ),
    )
