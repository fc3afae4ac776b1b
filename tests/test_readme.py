"""The snippets of the README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.models.llama import TOY, Llama

ROOT = Path(bw.__file__).parent


class Encoder(nn.Module):
    """A tiny model with the arguments the README uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
            for _ in range(4)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids) * attention_mask[..., None]
        heads = (f(x).unflatten(-1, (2, 4)).mT.mT.transpose(1, 2) for f in self.projections())
        x = nn.functional.scaled_dot_product_attention(*heads)
        for block in self.blocks:
            x = x + block(x)
        return x

    def projections(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("index", range(len(snippets())))
def test_snippet(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(10).reshape(2, 5)
    inputs = (ids, torch.ones_like(ids))
    scope: dict[str, Any] = {
        "bw": bw, "model": Encoder().eval(), "example_inputs": inputs,
        "input_ids": inputs[0], "attention_mask": inputs[1], "batches": [inputs],
        "torch": torch, "decoder": Llama(TOY).eval(), "tokens": ids, "prompt": ids,
    }  # fmt: skip
    exec(snippets()[index], scope)
