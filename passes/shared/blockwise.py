"""Operations on blocks: what stands for a layer, a product, a softmax, a norm, a sum.

    y = f(Q(x1), Q(x2), ..., w)         w = codes * 2^-shift

Every operation rounds what it reads to blocks, so every edge between two of them is in blocks.

Source: Dong and Chen, 2023, arXiv:2304.01483.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ir.recognize.calls import arguments
from ...ir.recognize.operation import Operation
from ...ir.region_module import RegionModule
from ...ir.regions import changed
from .block_fit import is_rounded
from .block_weights import Scheme, block_for, coded_weights, hold, stored


def compressed(operation: Operation, scheme: Scheme) -> nn.Module:
    """Return what stands for an operation."""
    if operation.form == "embedding" and scheme.bits:
        return BlockEmbedding(operation, scheme)
    if scheme.values:
        if operation.form == "linear" and scheme.bits:
            return BlockLinear(operation, scheme)
        if operation.form == "matmul":
            return BlockMatmul(operation, scheme)
        if operation.form == "attention":
            return BlockAttention(operation, scheme)
        if operation.form == "softmax":
            return BlockSoftmax()
        if operation.form == "activation":
            return BlockActivation(operation.function, scheme.block)
    return OnBlocks(operation, scheme)


class BlockLinear(nn.Module):
    """A linear layer over codes, reading values in blocks."""

    weight_q: Tensor
    weight_shift: Tensor

    def __init__(self, linear: Operation, scheme: Scheme) -> None:
        super().__init__()
        _, weight, *bias = linear.node.args
        hold(self, "weight", stored(linear, _node(weight), scheme))
        self.bias = None
        if bias and bias[0] is not None:
            self.bias = nn.Parameter(linear.tensor(_node(bias[0])), requires_grad=False)
        self.scheme = scheme

    def forward(self, x: Tensor) -> Tensor:
        s = self.scheme
        return torch.ops.blockwright.block_linear(
            x, self.weight_q, self.weight_shift, self.bias, s.bits, list(s.weight_block),
            s.values, s.block, s.integer,
        )  # fmt: skip


class BlockEmbedding(nn.Module):
    """An embedding table of codes."""

    weight_q: Tensor
    weight_shift: Tensor

    def __init__(self, embedding: Operation, scheme: Scheme) -> None:
        super().__init__()
        (table,) = embedding.weights
        hold(self, "weight", stored(embedding, table, scheme))
        self.columns, self.dtype = embedding.tensor(table).shape[1], embedding.tensor(table).dtype
        self.scheme = scheme

    def forward(self, ids: Tensor) -> Tensor:
        s = self.scheme
        return torch.ops.blockwright.block_embedding(
            ids, self.weight_q, self.weight_shift, self.columns, s.bits, list(s.weight_block),
            self.dtype,
        )  # fmt: skip


class BlockMatmul(nn.Module):
    """A product of two values in blocks."""

    def __init__(self, product: Operation, scheme: Scheme) -> None:
        super().__init__()
        self.scheme, self.is_square = scheme, len(product.inputs) == 1

    def forward(self, *factors: Tensor) -> Tensor:
        a, b = factors * 2 if self.is_square else factors
        return product_of(a, b, self.scheme)


class BlockAttention(nn.Module):
    """`scaled_dot_product_attention` taken apart: both products in blocks, softmax by table."""

    def __init__(self, attention: Operation, scheme: Scheme) -> None:
        super().__init__()
        given = arguments(attention.node)
        roles = [given.get(name) for name in ("query", "key", "value", "attn_mask")]
        self.sources = [None if n is None else attention.inputs.index(n) for n in roles]
        self.causal = bool(given.get("is_causal"))
        self.repeats_heads = bool(given.get("enable_gqa"))
        self.scale, self.scheme = given.get("scale"), scheme

    def forward(self, *inputs: Tensor) -> Tensor:
        query, key, value, mask = (None if i is None else inputs[i] for i in self.sources)
        assert query is not None
        assert key is not None
        assert value is not None
        if self.repeats_heads:
            copies = query.shape[-3] // key.shape[-3]
            key, value = (x.repeat_interleave(copies, dim=-3) for x in (key, value))
        scale = 1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale
        scores = product_of(query, key.transpose(-2, -1), self.scheme)
        p = torch.ops.blockwright.block_softmax(scores, mask, self.causal, scale)
        return product_of(p, value, self.scheme, self.scheme.probabilities)


class BlockSoftmax(nn.Module):
    """Softmax over the last axis by table."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.blockwright.block_softmax(x, None, False, 1.0)


class BlockActivation(nn.Module):
    """An activation by table."""

    def __init__(self, function: str, block: int) -> None:
        super().__init__()
        self.function, self.block = function, block

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.blockwright.block_activation(x, self.function, self.block)


class OnBlocks(nn.Module):
    """An operation as it is, its weights decoded and what it reads rounded to blocks."""

    def __init__(self, operation: Operation, scheme: Scheme) -> None:
        super().__init__()
        coded = coded_weights(operation) if scheme.bits else ()
        names = [str(node.target).rpartition(".")[2] for node in coded]
        self.names = [f"{name}_{i}" if name in names[:i] else name for i, name in enumerate(names)]
        self.shapes = [list(operation.tensor(node).shape) for node in coded]
        for name, node in zip(self.names, coded, strict=True):
            hold(self, name, stored(operation, node, scheme))
        self.inner = RegionModule(changed(operation, inputs=(*operation.inputs, *coded)))
        self.rounded = [is_rounded(node) for node in operation.inputs]
        self.scheme = scheme

    def forward(self, *inputs: Tensor) -> Any:
        values = [self._round(x) if r else x for x, r in zip(inputs, self.rounded, strict=True)]
        weights = [
            self._weight(name, shape, inputs[0])
            for name, shape in zip(self.names, self.shapes, strict=True)
        ]
        return self.inner(*values, *weights)

    def _round(self, x: Tensor) -> Tensor:
        s = self.scheme
        if s.values is None:
            return x
        return torch.ops.blockwright.block_round(x, s.values, s.block, -1, s.pow2)

    def _weight(self, name: str, shape: list[int], like: Tensor) -> Tensor:
        codes, shift = getattr(self, f"{name}_q"), getattr(self, f"{name}_shift")
        s, block = self.scheme, list(block_for(len(shape), self.scheme))
        return torch.ops.blockwright.block_weight(like, codes, shift, shape, s.bits, block)


def product_of(a: Tensor, b: Tensor, scheme: Scheme, a_form: str | None = None) -> Tensor:
    """Multiply two values in blocks."""
    form = scheme.values
    return torch.ops.blockwright.block_matmul(
        a, b, a_form or form, form, scheme.block, scheme.pow2, scheme.integer
    )


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value
