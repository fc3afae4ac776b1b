"""Weights in blocks: which of an operation are, how, and that a tied one is encoded once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, fx, nn

from ...ir.errors import OptionError
from ...ir.ops.block_codes import HUGE, encode_matrix
from ...ir.program import Program
from ...ir.recognize.operation import Operation


@dataclass(frozen=True)
class Scheme:
    """How one operation is compressed.

    Attributes:
        bits: Of the codes of its weights, 8 or 4; None when they stay, or there are none.
        weight_block: Rows and columns of a weight that share a scale.
        values: Format of what it reads, `int8` or `fp8`; None when that stays in floating point.
        block: Numbers of a value that share a scale.
        probabilities: Format of the left factor in the second product of an attention.
        pow2: Whether scales are powers of two.
        integer: Whether products are computed in integers.
    """

    bits: int | None
    weight_block: tuple[int, int]
    values: str | None
    block: int
    probabilities: str
    pow2: bool
    integer: bool


class StoredBlocks(NamedTuple):
    """A weight in codes, see `ir.ops.block_codes.encode_matrix`."""

    codes: Tensor
    shift: Tensor


def coded_weights(operation: Operation) -> tuple[fx.Node, ...]:
    """Return the weights of an operation that are stored in codes: biases of layers are not."""
    if operation.form in ("linear", "convolution"):
        weight = operation.node.args[1]
        return (weight,) if isinstance(weight, fx.Node) and weight.op == "get_attr" else ()
    if operation.form not in ("norm", "elementwise", "embedding"):
        return ()
    parameters = operation.program.parameters
    return tuple(n for n in operation.weights if operation.tensor_name(n) in parameters)


def block_for(rank: int, scheme: Scheme) -> tuple[int, int]:
    """Return the blocks of a weight: those of a vector are one row."""
    return scheme.weight_block if rank > 1 else (1, scheme.block)


_made: WeakKeyDictionary[Program, dict[object, StoredBlocks]] = WeakKeyDictionary()


def stored(operation: Operation, node: fx.Node, scheme: Scheme) -> StoredBlocks:
    """Return the codes of a weight; one that is read in several places is encoded once.

    Raises:
        OptionError: It holds NaN or infinity.
    """
    if not operation.is_shared(node):
        return _encoded(operation, node, scheme)
    made = _made.setdefault(operation.program, {})
    name = operation.tensor_name(node)
    key = (name, scheme.bits, scheme.weight_block, scheme.block, scheme.pow2)
    if key not in made:
        made[key] = _encoded(operation, node, scheme)
    return made[key]


def _encoded(operation: Operation, node: fx.Node, scheme: Scheme) -> StoredBlocks:
    weight = operation.tensor(node).detach()
    if not weight.is_meta and not bool((weight.abs() < HUGE).all()):
        raise OptionError(
            f"{operation.tensor_name(node)} holds NaN or infinity, which no code stands for.",
            where=operation.label,
            remedy=f"repair the weight, or leave it out with exclude={operation.label!r}.",
        )
    matrix = weight.reshape(*matrix_shape(tuple(weight.shape), operation.form))
    assert scheme.bits is not None
    block = block_for(weight.dim(), scheme)
    return StoredBlocks(*encode_matrix(matrix, scheme.bits, block, pow2=scheme.pow2))


def matrix_shape(shape: tuple[int, ...], form: str) -> tuple[int, int]:
    """Return a weight's shape as a matrix: a filter is a row, all else keeps its last axis."""
    rows = shape[0] if form == "convolution" else math.prod(shape[:-1])
    return rows, math.prod(shape) // max(rows, 1)


def hold(module: nn.Module, name: str, blocks: StoredBlocks) -> None:
    """Keep codes and scales of a weight as `<name>_q` and `<name>_shift`."""
    module.register_buffer(f"{name}_q", blocks.codes)
    module.register_buffer(f"{name}_shift", blocks.shift)
