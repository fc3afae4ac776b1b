"""Methods from different papers, one after the other, down to an engine on disk."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockwright as bw
from blockwright.models.dit import DiT, DiTConfig
from blockwright.models.gpt import GPT, GPTConfig

DIT = DiTConfig(latent=4, channels=2, classes=3, dim=8, heads=2, depth=4, ffn_dim=16)


def gpt() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=4, ffn_dim=16)), (
        torch.arange(16).reshape(2, 8),
    )


def dit() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = DiT(DIT)
    return model, model.example_inputs()


def task_loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of each sample."""
    return F.mse_loss(outputs, target, reduction="none").flatten(1).mean(dim=1)


@torch.no_grad()
def without_a_network(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return what the model says without its last feed-forward network: a target worth a cut."""
    pruned = copy.deepcopy(module)
    for parameter in pruned.get_submodule("blocks.3.down").parameters():
        parameter.zero_()
    return pruned(*inputs)


RECIPES: dict[str, list[Any]] = {
    "fuse-quantize": [bw.FuseBlocks(keep_ratio=0.75, group=4, epochs=2), bw.QuantizeWeights()],
    "contiguous": [
        bw.PruneContiguous(intervals=((1, 2),)),
        bw.FuseProjections(allow_no_match=True),  # those of the DiT are one layer already
        bw.QuantizeWeights(),
    ],
    "accuracy": [bw.PruneAccuracyDriven(group_size=8, majority=0.0), bw.QuantizeWeights()],
    "loop": [bw.LoopBlocks(), bw.QuantizeWeights()],
    "experts": [
        bw.DropBlocks(blocks=(1,)),
        bw.DenseToMoE(experts=3, active=1),
        bw.FuseProjections(allow_no_match=True),
        bw.QuantizeWeights(),
    ],
}


@pytest.mark.parametrize(
    "model", [gpt, pytest.param(dit, marks=pytest.mark.slow)], ids=["gpt", "dit"]
)
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, model: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = model()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    module.eval()
    judged = name == "accuracy"
    sets: list[Any] = [inputs, tuple(t.flip(0) for t in inputs)]
    if judged:
        sets = [(one, without_a_network(module, one)) for one in sets]
    engine = bw.compile(
        module, RECIPES[name], inputs, calibration=sets, loss=task_loss if judged else None,
        backend="onnxruntime",
    )  # fmt: skip
    engine.save(tmp_path / "engine.bw")
    loaded = bw.load(tmp_path / "engine.bw")
    torch.testing.assert_close(loaded(*inputs), engine(*inputs))
    eager = bw.compile(engine.program, [], inputs, backend="eager")
    torch.testing.assert_close(engine(*inputs), eager(*inputs), rtol=1e-3, atol=1e-4)
    steps = engine.record["steps"]
    assert [step["pass"] for step in steps] == [pass_.name for pass_ in RECIPES[name]]
    for step in steps:
        assert step["receipt"]["changed"] or step["options"].get("allow_no_match")
        if step["receipt"]["changed"]:
            assert step["certificate"]["outputs"]
            assert step["certificate"]["costs"]["flops"]["measured"] > 0
    assert engine.program.cost().weight_bytes < bw.capture(module, inputs).cost().weight_bytes
    report = str(engine.report)
    assert all(re.search(re.escape(step["pass"]), report) for step in steps)
