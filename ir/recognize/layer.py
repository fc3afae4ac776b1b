"""One linear layer, or its share of a fused one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor, fx

from ..errors import OptionError
from ..graphs import aten
from ..regions import Region, local_path
from .calls import is_layer
from .flow import Flow


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer(Region):
    """`y = (x @ weight.T + bias)[..., start:stop]`: a part that other regions are made of.

    Attributes:
        weight_node: The `get_attr` node of the whole weight; None when it is stored as codes.
        bias_node: The one of the whole bias, or None.
        features: Range (start, stop) of output features; None when they are no such range, as
            when query, key and value take turns head by head.
        in_features: Width of the input.
    """

    weight_node: fx.Node | None
    bias_node: fx.Node | None
    features: tuple[int, int] | None
    in_features: int
    kind: ClassVar[str] = "layer"

    @property
    def node(self) -> fx.Node:
        """The call of the whole layer."""
        return self.nodes[0]

    @property
    def is_dense(self) -> bool:
        """Whether the weight is stored as numbers, and this layer's share of it is known."""
        return self.weight_node is not None and self.features is not None

    @property
    def is_fused(self) -> bool:
        """Whether the same matrix product computes something else as well."""
        return self.features != self.all_features(self.node)

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features].

        Raises:
            OptionError: `is_dense` is false.
        """
        if self.weight_node is None or self.features is None:
            raise OptionError(
                f"{self.label} has no dense weight of its own.",
                remedy="ask for is_dense first, or run the pass before quantize-weights.",
            )
        return self.tensor(self.weight_node)[slice(*self.features)]

    @property
    def bias(self) -> Tensor | None:
        """[out_features], or None."""
        if self.bias_node is None or self.features is None:
            return None
        return self.tensor(self.bias_node)[slice(*self.features)]

    @staticmethod
    def all_features(node: fx.Node) -> tuple[int, int]:
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
        return cls.of(origin.anchor, origin.features.span if origin.features else None)

    @classmethod
    def of(cls, node: fx.Node, features: tuple[int, int] | None) -> Self:
        """Return the layer a node calls."""
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        dense = node.target is aten.linear.default
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        return cls(
            path=local_path(node),
            nodes=(node,),
            inputs=(source,),
            outputs=(node,),
            weight_node=given["weight"] if dense else None,
            bias_node=given.get("bias"),
            features=features,
            in_features=int(source.meta["val"].shape[-1]),
        )
