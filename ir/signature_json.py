"""How a program is called, as plain JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .literals import decode, dtype_from, encode
from .signature import Argument, Signature, TensorSpec
from .structure import Structure


def signature_to_json(signature: Signature) -> dict[str, Any]:
    """Return a signature as plain JSON."""
    return {
        "arguments": [
            {
                "name": argument.name,
                "positional": argument.positional,
                "structure": argument.structure.to_json(),
                "leaves": [_leaf_to_json(leaf) for leaf in argument.leaves],
            }
            for argument in signature.arguments
        ],
        "outputs": signature.outputs.to_json(),
        "constants": [[index, encode(value)] for index, value in signature.constants.items()],
        "parameters": list(signature.parameters),
        "ranges": {name: list(limits) for name, limits in signature.ranges.items()},
        "symbols": dict(signature.symbols),
    }


def signature_from_json(data: Mapping[str, Any]) -> Signature:
    """Return the signature `signature_to_json` wrote."""
    return Signature(
        arguments=tuple(
            Argument(
                str(item["name"]),
                bool(item["positional"]),
                Structure.from_json(item["structure"]),
                tuple(_leaf_from_json(leaf) for leaf in item["leaves"]),
            )
            for item in data["arguments"]
        ),
        outputs=Structure.from_json(data["outputs"]),
        constants={int(index): decode(value) for index, value in data["constants"]},
        parameters=tuple(data["parameters"]),
        ranges={name: (low, high) for name, (low, high) in data["ranges"].items()},
        symbols=dict(data["symbols"]),
    )


def _leaf_to_json(leaf: Any) -> Any:
    if not isinstance(leaf, TensorSpec):
        return {"constant": encode(leaf)}
    dtype = str(leaf.dtype).removeprefix("torch.")
    return {"name": leaf.name, "dtype": dtype, "shape": list(leaf.shape)}


def _leaf_from_json(data: Mapping[str, Any]) -> Any:
    if "constant" in data:
        return decode(data["constant"])
    return TensorSpec(str(data["name"]), dtype_from(data["dtype"]), tuple(data["shape"]))
