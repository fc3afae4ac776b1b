"""Compress a transformer in small blocks: weights, and every value between two operations.

    s = floor(log2(127 / max|x|))     q = round(x * 2^s)     x ~ q * 2^-s          per block
    C = sum_k 2^-(sA_k + sB_k) (qA_k @ qB_k)                                       products
    T_s[q] = GELU(q 2^-s)        p = e / sum(e), e_c = exp(-c / 32)                tables

Embedding tables, layers, both products of an attention, softmax, activations, norms, sums and
products of values read blocks: rectangles of weights, stretches of rows of values. Four-bit codes
are stored two to a byte, shifts in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import MAIN
from ..ir.recognize import Embedding
from ..ir.recognize.operation import FORMS, Operation
from ..ir.regions import find_once
from .base import Pass, Plan, Promise, Skip, require_choice, selected
from .shared.block_fit import reason_to_skip
from .shared.block_weights import Scheme, coded_weights
from .shared.blockwise import compressed

Role = tuple[int | None, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class QuantizeBlockwise(Pass[Operation, Scheme]):
    """Quantize weights, intermediate results and non-linear functions, one scale per block.

    Attributes:
        bits: Of weights of layers: 8, 4, or None to leave them alone.
        embedding_bits: Of tables, of layers tied to one, and of positions that are added.
        head_bits: Of the layers that make the result.
        norm_bits: Of scale and shift of norms, and other vectors: 8 or None.
        activations: Format of intermediate results: `int8`, `fp8` (e4m3), or None, which
            compresses weights alone and is not the published method.
        probabilities: Format of attention probabilities: `int8`, `fp8`, or `uint8`, one shift of 7
            for all of them.
        weight_block: Rows and columns of a weight that share a scale.
        embedding_block: The same for tables.
        activation_block: Numbers of an intermediate result that share a scale, along the axis that
            is summed over: keys for the values of an attention.
        scale: `pow2`, a shift stored in a byte, or `float`, stored in four.
        lowering: `simulate` multiplies what codes stand for, `integer` the codes (shifts and
            integer formats only).
        operations: What is compressed.
        include: Glob patterns of module paths to compress.
        exclude: Glob patterns of module paths to leave alone.

    Raises:
        OptionError: An option is out of range or does not go with another, or a weight holds NaN
            or infinity.

    Source: Dong and Chen, 2023, arXiv:2304.01483.
    Differs: the numeric scheme is a reconstruction from the abstract. Values are cut into blocks as
        they come, without calibration; results of the model, biases, and norms between reading and
        writing stay in floating point; tables of GELU and softmax take int8 codes in every
        variant; exponentials are cut off e^-8 below the largest. `activations=None` compresses
        weights alone, and the receipt counts no operation on rounded values.
    Exact when: weights are multiples of their scales and `activations` is None.
    """

    name: ClassVar[str] = "quantize-blockwise"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"bits": 4, "activations": "fp8", "probabilities": "uint8"},
        {"lowering": "integer"},
        {"activations": None, "scale": "float"},
    )
    bits: int | None = 8
    embedding_bits: int | None = 8
    head_bits: int | None = 8
    norm_bits: int | None = 8
    activations: str | None = "int8"
    probabilities: str = "int8"
    weight_block: tuple[int, int] = (32, 32)
    embedding_block: tuple[int, int] = (32, 32)
    activation_block: int = 32
    scale: str = "pow2"
    lowering: str = "simulate"
    operations: tuple[str, ...] = FORMS
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option in ("bits", "embedding_bits", "head_bits"):
            require_choice(self.name, option, getattr(self, option), (8, 4, None))
        require_choice(self.name, "norm_bits", self.norm_bits, (8, None))
        require_choice(self.name, "activations", self.activations, ("int8", "fp8", None))
        require_choice(self.name, "probabilities", self.probabilities, ("int8", "fp8", "uint8"))
        require_choice(self.name, "scale", self.scale, ("pow2", "float"))
        require_choice(self.name, "lowering", self.lowering, ("simulate", "integer"))
        for form in self.operations:
            require_choice(self.name, "operations", form, FORMS)
        for option in ("weight_block", "embedding_block"):
            block = getattr(self, option)
            if len(block) != 2 or min(block) < 1:
                raise OptionError(f"{self.name}: {option}={list(block)} is no rows and columns.")
        if self.activation_block < 1:
            raise OptionError(
                f"{self.name}: activation_block={self.activation_block} holds no number;"
                " use 1 or more."
            )
        formats = (self.scale, self.activations, self.probabilities == "fp8")
        if self.lowering == "integer" and formats != ("pow2", "int8", False):
            raise OptionError(
                f"{self.name}: lowering=integer needs scale=pow2, activations=int8 and integer"
                " probabilities."
            )

    def ends(self) -> frozenset[Fact]:
        everywhere = self.include == ("*",) and not self.exclude and "linear" in self.operations
        return frozenset(
            fact
            for fact, ended in (
                (Fact.DENSE_WEIGHTS, everywhere and self.bits is not None),
                (Fact.CALIBRATED, self.activations is not None),
            )
            if ended
        )

    def decide(self, operation: Operation) -> Scheme | Skip:
        if not selected(operation.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=operation)
        if operation.form not in self.operations:
            return Skip(f"is of the kind {operation.form}, which is not asked for", at=operation)
        reason = reason_to_skip(operation)
        if reason:
            return Skip(reason, at=operation)
        bits, block = self._role(operation) if coded_weights(operation) else (None, (1, 1))
        values = None if operation.form in ("embedding", "convolution") else self.activations
        if bits is None and values is None:
            return Skip("has no weights that are compressed, and values stay as they are",
                        at=operation)  # fmt: skip
        return Scheme(
            bits=bits,
            weight_block=block,
            values=values,
            block=self.activation_block,
            probabilities=self.probabilities,
            pow2=self.scale == "pow2",
            integer=self.lowering == "integer",
        )

    def replace(self, operation: Operation, scheme: Scheme) -> nn.Module:
        return compressed(operation, scheme)

    def statistics(self, plan: Plan[Scheme]) -> Mapping[str, int]:
        schemes = plan.decisions.values()
        return {
            "coded_weights": sum(scheme.bits is not None for scheme in schemes),
            "operations_on_rounded_values": sum(scheme.values is not None for scheme in schemes),
        }

    def _role(self, operation: Operation) -> Role:
        """Return bits and blocks of an operation's weights."""
        table = self.embedding_bits, self.embedding_block
        if operation.form == "embedding" or is_tied_to_table(operation):
            return table
        if operation.form in ("norm", "elementwise"):
            vectors = all(operation.tensor(n).dim() == 1 for n in coded_weights(operation))
            return (self.norm_bits, self.weight_block) if vectors else table
        return (self.head_bits if is_head(operation) else self.bits), self.weight_block


def is_tied_to_table(operation: Operation) -> bool:
    """Whether a weight of an operation is an embedding table as well."""
    program = operation.program
    names = {operation.tensor_name(node) for node in coded_weights(operation)}
    tables = find_once(program.graphs[MAIN], Embedding)
    return any(str(table.weight_node.target) in names for table in tables)


def is_head(operation: Operation) -> bool:
    """Whether an operation is one of the layers that make the result."""
    if operation.graph != MAIN or operation.form != "linear":
        return False
    layers = (layer for head in operation.program.heads() for layer in head.layers)
    return any(layer.node is operation.node for layer in layers)
