"""Graft the weights of a block that goes onto those of blocks that stay.

    W = W_t + B A + C * W_g             C = P Q, one number per row, or one per weight
    b = b_t + c * b_g

W_t is the weight of a block that stays, W_g that of the block that goes; `*` multiplies number by
number. At first B, C and c are zero, so nothing has changed. Calling the module gives the weight:
what is left of a graft after training is an ordinary one.

Source: Pei et al., FuseGPT, 2024, arXiv:2411.14507.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from ...ir.recognize import Block, Linear
from ...ir.recognize.spelled import TransposedLinear
from ...ir.regions import find_once

FORMS = ("low_rank", "row", "matrix", "none")


class GraftedMatrix(nn.Module):
    """A weight that is trained in few directions, and takes up another one.

    Args:
        own: [rows, columns].
        donor: What is grafted on, [rows, columns]; None for nothing.
        rank: Largest rank of B A and P Q.
        form: What C is made of: `low_rank`, `row` (one number per output), `matrix`, or `none`.
        outputs: Axis of the output features, 0 or 1.
    """

    def __init__(
        self, own: Tensor, donor: Tensor | None, *, rank: int, form: str, outputs: int = 0
    ) -> None:
        super().__init__()
        rows, columns = own.shape
        rank = min(rank, rows, columns)
        self.dtype, self.precision = own.dtype, torch.promote_types(own.dtype, torch.float32)
        # No buffers: what does not move need not be sent to other processes.
        self.own = own.detach()
        self.donor = None if donor is None or form == "none" else donor.detach()
        self.lora_b, self.lora_a = self._zeros(rows, rank), self._drawn(rank, columns)
        self.coef = nn.ParameterList()
        if self.donor is not None and form == "low_rank":
            self.coef.extend((self._zeros(rows, rank), self._drawn(rank, columns)))
        elif self.donor is not None:
            per_output = (rows, 1) if outputs == 0 else (1, columns)
            self.coef.append(self._zeros(*(per_output if form == "row" else (rows, columns))))

    def forward(self) -> Tensor:
        weight = self.own.to(self.precision) + self.lora_b @ self.lora_a
        if self.donor is not None:
            weight = weight + _product(list(self.coef)) * self.donor.to(self.precision)
        return weight.to(self.dtype)

    def _zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(self.own.new_zeros(shape, dtype=self.precision))

    def _drawn(self, *shape: int) -> nn.Parameter:
        drawn = self._zeros(*shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        return drawn


class GraftedVector(nn.Module):
    """A bias that is trained, and takes up another one.

    Args:
        own: [features].
        donor: What is grafted on, [features].
    """

    def __init__(self, own: Tensor, donor: Tensor) -> None:
        super().__init__()
        self.dtype, precision = own.dtype, torch.promote_types(own.dtype, torch.float32)
        self.value = nn.Parameter(own.detach().to(precision, copy=True))
        self.coef = nn.Parameter(torch.zeros_like(self.value))
        self.donor = donor.detach().to(precision)

    def forward(self) -> Tensor:
        return (self.value + self.coef * self.donor).to(self.dtype)


def grafted(
    blocks: Sequence[Block], gone: Block, *, rank: int, form: str
) -> dict[str, nn.Module | None]:
    """Return what is trained of some blocks when another one is grafted on them.

    Matrices of linear layers get a graft where the block is a twin of the one that goes, and are
    trained in few directions where it is not; biases, scales of norms and other vectors are trained
    as they are. Weights that are read elsewhere too are left alone.

    Args:
        blocks: Those that stay.
        gone: The one that goes, in the program before.
        rank: As in `GraftedMatrix`.
        form: As in `GraftedMatrix`.

    Returns:
        As in `Stage.weights`.
    """
    found: dict[str, nn.Module | None] = {}
    for block in blocks:
        twins = counterparts(block, gone)
        layers = list(linears(block))
        biases = {layer.bias_node for layer in layers}
        for layer in layers:
            twin = twins.get(layer.weight_node)
            donor = gone.tensor(twin) if twin else None
            found[block.tensor_name(layer.weight_node)] = GraftedMatrix(
                block.tensor(layer.weight_node), donor, rank=rank, form=form,
                outputs=int(isinstance(layer, TransposedLinear) and layer.turned),
            )  # fmt: skip
        for vector in _vectors(block):
            twin = twins.get(vector) if vector in biases and form != "none" else None
            found[block.tensor_name(vector)] = (
                GraftedVector(block.tensor(vector), gone.tensor(twin)) if twin else None
            )
    return found


def are_twins(block: Block, other: Block) -> bool:
    """Whether blocks compute the same, masks included, weights apart."""
    kinds = [(b.structure, str([a.constants() for a in b.attentions])) for b in (block, other)]
    return kinds[0] == kinds[1]


def can_take_up(block: Block, gone: Block) -> bool:
    """Whether a block has layers that the weights of another one can be grafted on."""
    return are_twins(block, gone) and any(True for _ in linears(block))


def counterparts(block: Block, other: Block) -> Mapping[fx.Node, fx.Node]:
    """Return the weights of another block by those of one; none if they are no twins."""
    if not are_twins(block, other):
        return {}
    return dict(zip(block.weight_nodes, other.weight_nodes, strict=True))


def linears(block: Block) -> Iterator[Linear | TransposedLinear]:
    """Yield the dense linear layers of a block whose weights nothing else reads."""
    inside, graph = set(block.nodes), block.nodes[0].graph
    found: list[Linear | TransposedLinear] = [*find_once(graph, Linear)]
    for layer in (*found, *find_once(graph, TransposedLinear)):
        if inside.issuperset(layer.nodes) and not block.is_shared(layer.weight_node):
            yield layer


def _vectors(block: Block) -> list[fx.Node]:
    """Return the vectors that a block reads and nothing else does."""
    read = dict.fromkeys(source for node in block.nodes for source in node.all_input_nodes)
    return [
        node
        for node in read
        if node.op == "get_attr"
        and block.tensor_name(node) in block.program.parameters
        and block.tensor(node).dim() == 1
        and not block.is_shared(node)
    ]


def _product(factors: Sequence[Tensor]) -> Tensor:
    return factors[0] @ factors[1] if len(factors) == 2 else factors[0]
