"""Feed-forward experts, and what one of them computes.

plain    act(x @ up.T + up_bias) @ down.T + down_bias
gated    (act(x @ gate.T + gate_bias) * (x @ up.T + up_bias)) @ down.T + down_bias
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .activations import FUNCTIONS


@dataclass(frozen=True)
class Experts:
    """Weights of all experts along the first axis, or of one expert without that axis.

    Attributes:
        gate: [experts, ffn_dim, dim]; None when experts are plain.
        up: [experts, ffn_dim, dim].
        up_bias: [experts, ffn_dim] or None.
        gate_bias: [experts, ffn_dim] or None.
        down: [experts, dim, ffn_dim].
        down_bias: [experts, dim] or None.
        activation: A key of `FUNCTIONS`.
    """

    gate: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All weights, in the order of the attributes."""
        return (self.gate, self.up, self.up_bias, self.gate_bias, self.down, self.down_bias)

    def one(self, expert: int) -> Experts:
        """Return one expert."""
        own: list[Any] = [None if t is None else t[expert] for t in self.tensors]
        return Experts(*[*own, self.activation])

    def answer(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """Return what one expert computes."""
        *_, hidden = self.hidden(x)
        return F.linear(hidden, self.down, self.down_bias)

    def hidden(self, x: Float[Tensor, "rows dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what one expert activates, what it multiplies that by, and its hidden neurons.

        Nothing is multiplied in a plain expert; what is activated stands twice.
        """
        act, value = FUNCTIONS[self.activation], F.linear(x, self.up, self.up_bias)
        if self.gate is None:
            return value, value, act(value)
        pre = F.linear(x, self.gate, self.gate_bias)
        return pre, value, act(pre) * value
