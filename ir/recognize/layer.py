"""One linear layer, or its share of a fused one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor, fx

from ..errors import OptionError
from ..graphs import aten
from ..regions import Region, local_path
from .calls import arguments, is_layer
from .flow import Flow
from .rows import Rows

Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer(Region):
    """`y = (x[..., columns] @ weight.T + bias)[..., rows]`: a part that other regions are made of.

    The share of a layer that reads several values side by side is its share of the columns:
    `down([attended, hidden]) = down[:, :dim](attended) + down[:, dim:](hidden)`.

    Attributes:
        weight_node: The `get_attr` node of the whole weight; None when it is stored as codes.
        bias_node: The one of the whole bias, or None.
        rows: Output features; None when they are no regular set.
        columns: Range (start, stop) of input features; None for all.
        in_features: Width of the input, or of this share of it.
    """

    weight_node: fx.Node | None
    bias_node: fx.Node | None
    rows: Rows | None
    columns: Range | None
    in_features: int
    kind: ClassVar[str] = "layer"

    @property
    def node(self) -> fx.Node:
        """The call of the whole layer."""
        return self.nodes[0]

    @property
    def features(self) -> Range | None:
        """Range (start, stop) of output features.

        None when they are no range, as when query, key and value take turns head by head.
        """
        return self.rows.span if self.rows else None

    @property
    def is_dense(self) -> bool:
        """Whether the weight is stored as numbers, and this layer's share of it is known."""
        return self.weight_node is not None and self.rows is not None

    @property
    def is_fused(self) -> bool:
        """Whether the same matrix product computes something else as well."""
        return self.features != self.all_features(self.node) or self.columns is not None

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features].

        Raises:
            OptionError: `is_dense` is false.
        """
        if self.weight_node is None or self.rows is None:
            raise OptionError(
                f"{self.label} has no dense weight of its own.",
                remedy="ask for is_dense first, or run the pass before quantize-weights.",
            )
        rows = self.rows.take(self.tensor(self.weight_node))
        return rows[:, slice(*self.columns)] if self.columns else rows

    @property
    def bias(self) -> Tensor | None:
        """[out_features], or None. Of shares of the columns, the first has the bias."""
        if self.bias_node is None or self.rows is None or (self.columns and self.columns[0]):
            return None
        return self.rows.take(self.tensor(self.bias_node))

    @staticmethod
    def all_features(node: fx.Node) -> Range:
        """Return the range of all output features of the layer a node calls."""
        return 0, int(node.meta["val"].shape[-1])

    @classmethod
    def behind(cls, flow: Flow, value: fx.Node, *, untouched: bool = False) -> Self | None:
        """Return the layer a value comes from.

        Args:
            flow: The graph.
            value: Output of the layer, perhaps split, reshaped, normalised or rotated.
            untouched: Accept only the layer's own features, in its own layout.
        """
        origin = flow.origins[value]
        if not is_layer(origin.anchor):
            return None
        if untouched:
            changed = origin.norm or origin.foreign or origin.mixed or origin.factor != 1.0
            if changed or origin.features is None or not origin.features.is_flat:
                return None
        return cls.of(origin.anchor, origin.features.rows if origin.features else None)

    @classmethod
    def of(cls, node: fx.Node, rows: Rows | Range | None, columns: Range | None = None) -> Self:
        """Return the layer a node calls, or a share of it.

        Args:
            node: The call.
            rows: Output features, a range or any regular set; None when they are not known.
            columns: Input features; None for all.
        """
        given = arguments(node)
        dense = node.target is aten.linear.default
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        width = int(source.meta["val"].shape[-1])
        if isinstance(rows, tuple):
            rows = Rows.of(rows[0], [(rows[1] - rows[0], 1)])
        return cls(
            path=local_path(node),
            nodes=(node,),
            inputs=(source,),
            outputs=(node,),
            weight_node=given["weight"] if dense else None,
            bias_node=given.get("bias"),
            rows=rows,
            columns=None if columns == (0, width) else columns,
            in_features=columns[1] - columns[0] if columns else width,
        )
