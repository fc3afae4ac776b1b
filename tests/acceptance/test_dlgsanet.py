"""What DLGSANet claims of its size and work, without weights."""

from __future__ import annotations

import pytest
import torch

import blockwright as bw
from blockwright.models import dlgsanet
from blockwright.models.dlgsanet import DLGSANet
from blockwright.testing.acceptance import Acceptance

pytestmark = pytest.mark.acceptance
METHOD = "dlgsanet"
SIZES = {
    "Tiny x2": (dlgsanet.DLGSANET_TINY_X2, 565.7),
    "Tiny x4": (dlgsanet.DLGSANET_TINY_X4, 581.3),
    "Light x2": (dlgsanet.DLGSANET_LIGHT_X2, 745.2),
    "Light x3": (dlgsanet.DLGSANET_LIGHT_X3, 751.7),
    "Light x4": (dlgsanet.DLGSANET_LIGHT_X4, 760.8),
    "x2": (dlgsanet.DLGSANET_X2, 4733.7),
    "x3": (dlgsanet.DLGSANET_X3, 4745.9),
    "x4": (dlgsanet.DLGSANET_X4, 4762.9),
}


def test_sizes(acceptance: Acceptance) -> None:
    found = {}
    for name, (config, _) in SIZES.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in DLGSANet(config).parameters())
        found[name] = round(count / 1e3, 1)
    holds = all(found[name] == thousands for name, (_, thousands) in SIZES.items())
    acceptance(
        METHOD, 1, "All eight models have the published numbers of parameters.", naive="-",
        figure=", ".join(f"{name} {value} K" for name, value in found.items()), holds=holds,
    )  # fmt: skip
    assert holds, found


@pytest.mark.slow
def test_work_of_the_light_model(acceptance: Acceptance) -> None:
    config = dlgsanet.DLGSANET_LIGHT_X4
    height, width = 180, 320  # of 720 x 1280
    with torch.device("meta"):
        model = DLGSANet(config).eval()
        image = torch.empty(1, 3, height, width)
    kinds = bw.capture(model, (image,)).cost().by_kind
    dynamic = config.groups * config.depth * 49 * config.dim * height * width
    billions = (sum(kinds.values()) - kinds["elementwise"]) / 2e9 + dynamic / 1e9
    acceptance(
        METHOD, 1, "Light x4 takes 45.4 billion multiply-adds for 1280 x 720 pixels, within 1 %.",
        naive="-", figure=f"{billions:.2f} billion", holds=abs(billions / 45.4 - 1) < 0.01,
    )  # fmt: skip
    assert billions == pytest.approx(45.4, rel=0.01)
