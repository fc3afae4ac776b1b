"""A region as a module: what a pass starts from when it keeps the old computation.

    y = RegionModule(region)(*inputs)

To wrap it (a gate, an adapter, a scale) or to train it again, and as the first version of a pass
whose own module is still to be written.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from .regions import Region


class RegionModule(nn.Module):
    """The nodes of a region with its weights as parameters and buffers.

    Instances of one block class share the nodes and so are traced once; see `ir.rewrite`.

    Args:
        region: What to compute, as its instance has it.
    """

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.inputs, self.nodes, self.outputs = region.inputs, region.nodes, region.outputs
        known = {*region.inputs, *region.nodes}
        read = (source for node in region.nodes for source in node.all_input_nodes)
        self.slots = tuple(dict.fromkeys(source for source in read if source not in known))
        for number, slot in enumerate(self.slots):
            self._hold(f"weight_{number}", region.tensor(slot))

    def forward(self, *inputs: Any) -> Tensor | tuple[Tensor, ...]:
        env: dict[fx.Node, Any] = dict(zip(self.inputs, inputs, strict=True))
        env |= {slot: getattr(self, f"weight_{i}") for i, slot in enumerate(self.slots)}
        for node in self.nodes:
            assert callable(node.target)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)
        results = tuple(env[node] for node in self.outputs)
        return results if len(results) > 1 else results[0]

    def _hold(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(name, tensor)
