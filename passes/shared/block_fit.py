"""Which operations can be computed on blocks, and why others cannot."""

from __future__ import annotations

from torch import Tensor, fx

from ...ir.program import MAIN
from ...ir.recognize.calls import arguments, op
from ...ir.recognize.operation import Operation
from .block_weights import coded_weights


def reason_to_skip(operation: Operation) -> str | None:
    """Say why an operation cannot be computed on blocks; None when it can."""
    if operation.is_router:
        return "is a router, which would choose other experts"
    if any(op(node) in ("block_round", "block_weight") for node in operation.inputs):
        return "reads blocks already"
    if not is_rounded(operation.node):
        return "computes no floating-point numbers"
    return _by_form(operation)


def _by_form(operation: Operation) -> str | None:
    given = arguments(operation.node)
    weights = [operation.tensor(n) for n in operation.weights]
    if any(not weight.is_floating_point() or not weight.numel() for weight in weights):
        return "has weights that are no floating-point numbers"
    if operation.form in ("linear", "embedding") and not coded_weights(operation):
        return "reads a weight that is computed, or no parameter"
    if operation.form == "matmul" and (operation.weights or _rank(operation) < 2):
        return "is no product of two computed matrices; run canonicalize first"
    if operation.form == "softmax" and given["dim"] % _rank(operation) != _rank(operation) - 1:
        return "runs over another axis than the last"
    if operation.form == "attention" and (given.get("dropout_p") or operation.weights):
        return "drops probabilities at random, or reads a stored tensor"
    if operation.form == "elementwise" and operation.graph == MAIN and not operation.derived:
        return "is made of inputs alone"
    return None


def _rank(operation: Operation) -> int:
    return min(node.meta["val"].dim() for node in operation.inputs)


def is_rounded(node: fx.Node) -> bool:
    """Whether a value is floating-point numbers in rows."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
