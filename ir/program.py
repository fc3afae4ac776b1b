"""A captured model: graphs, the weights they name, and how they are called.

One class, many instances. Repeated blocks are one graph; the main graph calls them:

    main:     x -> call "layers.0" -> call "layers.1" -> ...      instance -> class, weights
    class:    the block once; a `get_attr` node is a *slot* an instance fills with a tensor name

Graphs are frozen once they are in a Program. A change copies the graphs it touches, shares
everything else, and gives a new Program; the old one stays as it was, so rollback costs nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .branches import branches_of, choices, executed, operands_of, scope
from .errors import OptionError
from .graphs import argument_positions, remembered
from .signature import Signature

if TYPE_CHECKING:
    from .cost import Cost
    from .recognize import (
        Attention,
        Block,
        Embedding,
        Explanation,
        FeedForward,
        Head,
        Modulation,
        Norm,
        Stack,
        Stem,
    )
    from .regions import R, Region

MAIN = "main"


@dataclass(frozen=True)
class Instance:
    """One occurrence of a block class.

    Attributes:
        block: Name of the class, a key of `Program.graphs`.
        weights: Tensor name of every slot of the class graph.
    """

    block: str
    weights: Mapping[str, str]


@dataclass(frozen=True)
class StateSlot:
    """A value that lives from call to call, threaded through the graph.

    Attributes:
        name: Tensor of that name holds the initial value, or the one all of its elements have.
        input: Placeholder that receives the current value.
        output: Index of the next value among the main graph's outputs.
        faults: What the next value says went wrong, counted from 1; 0 says that all is well.
        warning: What to say when the next value is not 0.
    """

    name: str
    input: str
    output: int
    faults: tuple[str, ...] = ()
    warning: str = ""


@dataclass(frozen=True, eq=False)
class Program:
    """A model as data.

    Attributes:
        graphs: The graph `main`, one graph per block class, and the branches of choices; see
            `ir.branches`. Never edit them in place.
        instances: Block instances by the name that main's `call_module` nodes call.
        tensors: Parameters, buffers and constants by their name in the model. One name per
            storage: other names of a tied tensor are in `aliases`.
        signature: Arguments and result.
        aliases: Further names of tied tensors, to the name used in the graphs.
        parameters: Names in `tensors` that are parameters; the rest are buffers and constants.
        state: Values that live from call to call.
        notes: What capture left out or changed, in words, for the report.
    """

    graphs: Mapping[str, fx.Graph]
    tensors: Mapping[str, Tensor]
    signature: Signature
    instances: Mapping[str, Instance] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()
    state: tuple[StateSlot, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def main(self) -> fx.Graph:
        """The graph a call runs."""
        return self.graphs[MAIN]

    def with_(self, **changes: object) -> Program:
        """Return a program that differs in the given attributes and shares the rest."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def replace(self, region: Region, module: nn.Module, *, by: str = "replace") -> Program:
        """Return a program in which a module stands in a region's place.

        Args:
            region: Where, as found by `ir.regions.regions`.
            module: Takes the region's inputs and returns its outputs; traced and spliced in.
            by: Who did it, kept in the provenance of the new nodes.

        Raises:
            VerifyError: The module returns another number, shape or type of values.
        """
        from .rewrite import rewrite

        return rewrite(self, [(region, module)], by=by)

    def instances_of(self, block: str) -> list[str]:
        """Name the instances of a class, in execution order."""
        return [name for name in self.instances if self.instances[name].block == block]

    def calls(self) -> Iterator[fx.Node]:
        """Yield the calls of block instances, in execution order, those in branches among them."""
        return (node for node in executed(self.graphs, MAIN) if node.op == "call_module")

    def call(self, instance: str) -> fx.Node:
        """Return the call of a block instance, a node of main or of one of its branches."""
        return self._calls[instance]

    @cached_property
    def _calls(self) -> dict[str, fx.Node]:
        return {str(node.target): node for node in self.calls()}

    def given(
        self, instance: str | None, placeholder: fx.Node
    ) -> tuple[str | None, fx.Node] | None:
        """Return the value a placeholder is given where its graph is called.

        Args:
            instance: Block instance the placeholder is looked at through; None in main.
            placeholder: Of main, of a class, or of a branch.

        Returns:
            Instance and node of the value; None for an input of the program.
        """
        caller = self._callers.get((instance, placeholder.graph))
        if caller is None:
            return None
        outside, node = caller
        values: Any = node.args if node.op == "call_module" else operands_of(node)
        return outside, values[argument_positions(placeholder.graph)[placeholder]]

    @cached_property
    def _callers(self) -> dict[tuple[str | None, fx.Graph], tuple[str | None, fx.Node]]:
        """Who calls a graph of an instance: a node, and the instance it is looked at through."""
        found: dict[tuple[str | None, fx.Graph], tuple[str | None, fx.Node]] = {}
        for instance in (None, *self.instances):
            for key in self.scope(instance):
                for node in choices(self.graphs[key]):
                    for branch in branches_of(node):
                        found[instance, self.graphs[branch]] = instance, node
        for name, call in self._calls.items():
            found[name, self.graphs[self.instances[name].block]] = None, call
        return found

    def scope(self, instance: str | None = None) -> list[str]:
        """Return the keys of an instance's graph and the branches below it; of main for None."""
        return scope(self.graphs, self.instances[instance].block if instance else MAIN)

    def weight(self, slot: str, instance: str | None = None) -> Tensor:
        """Return the tensor behind a `get_attr` node's target.

        Args:
            slot: Target of the node.
            instance: Block instance the node is looked at through; None for the main graph.
        """
        name = self.instances[instance].weights[slot] if instance else slot
        return self.tensors[name]

    def arranged(
        self, inputs: Sequence[Tensor], state: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """Return a call's tensors in the order of main's placeholders.

        Args:
            inputs: The caller's tensors, in the order of `signature.inputs`.
            state: Current value by slot name; initial values when left out.
        """
        current = self.initial_state() if state is None else state
        values = {slot.input: current[slot.name] for slot in self.state}
        given = iter(inputs)
        places = (node.name for node in argument_positions(self.main))
        return [values[name] if name in values else next(given) for name in places]

    def initial_state(self) -> dict[str, Tensor]:
        """Return what every slot holds at first, by its name, in memory of its own."""
        places = {node.name: node.meta["val"] for node in argument_positions(self.main)}
        first = {s.name: self.tensors[s.name].expand(places[s.input].shape) for s in self.state}
        laid_out = torch.contiguous_format
        return {name: value.clone(memory_format=laid_out) for name, value in first.items()}

    def completed(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return inputs that may have been made before the program got its last arguments.

        Arguments that passes have added are 0: the first step, the first position. State that they
        have added is what it is at first.
        """
        missing = list(argument_positions(self.main))[len(inputs) :]
        if not missing:
            return [*inputs]
        initial = self.initial_state()
        known = {slot.input: initial[slot.name] for slot in self.state}
        values = {node.name: node.meta["val"] for node in missing}
        added = (
            known[name]
            if name in known
            else torch.zeros(value.shape, dtype=value.dtype, device=value.device)
            for name, value in values.items()
        )
        return [*inputs, *added]

    def nodes(self) -> int:
        """Count the nodes a flat graph would have, calls replaced by what they call."""
        sizes = {
            block: sum(len(self.graphs[key].nodes) for key in scope(self.graphs, block))
            for block in {MAIN, *(instance.block for instance in self.instances.values())}
        }
        blocks = sum(sizes[instance.block] for instance in self.instances.values())
        return sizes[MAIN] + blocks

    def sizes(self) -> dict[str, int]:
        """Return the size each symbolic dimension had in the example inputs."""
        from .shapes import example_sizes

        return example_sizes(self)

    def cost(self, sizes: Mapping[str, int] | None = None) -> Cost:
        """Count parameters, FLOPs and bytes; see `blockwright.ir.cost`."""
        from .cost import program_cost

        return program_cost(self, sizes) if sizes else self._example_cost

    @cached_property
    def _example_cost(self) -> Cost:
        from .cost import program_cost

        return program_cost(self)

    def regions(self, kind: type[R]) -> list[R]:
        """Return the regions of a kind in the whole model, in execution order."""
        from .regions import regions

        return list(regions(self, kind))

    def attentions(self) -> list[Attention]:
        """Return the attentions, in execution order."""
        from .recognize import Attention

        return self.regions(Attention)

    def feed_forwards(self) -> list[FeedForward]:
        """Return the feed-forward networks of residual blocks, in execution order."""
        from .recognize import FeedForward

        return self.regions(FeedForward)

    def norms(self) -> list[Norm]:
        """Return the norms, in execution order."""
        from .recognize import Norm

        return self.regions(Norm)

    def blocks(self) -> list[Block]:
        """Return the residual blocks, in execution order."""
        from .recognize import Block

        return self.regions(Block)

    def modulations(self) -> list[Modulation]:
        """Return what conditions do to blocks, in execution order."""
        from .recognize import Modulation

        return self.regions(Modulation)

    def stacks(self) -> list[Stack]:
        """Return the runs of blocks, in execution order."""
        from .recognize.stack import stacks_of

        return stacks_of(self)

    def embeddings(self) -> list[Embedding]:
        """Return the embedding tables, in execution order."""
        from .recognize import Embedding

        return self.regions(Embedding)

    def stems(self) -> list[Stem]:
        """Return what makes the streams of the inputs: tables, patches, layers and positions."""
        from .recognize.embedding import stems_of

        return stems_of(self)

    def heads(self) -> list[Head]:
        """Return what makes the results of the last streams."""
        from .recognize.head import heads_of

        return heads_of(self)

    def explain(self) -> Explanation:
        """Say which region owns every parameter and FLOP, and what nearly is a region."""
        from .recognize import explain

        return explain(self)

    def text(self) -> str:
        """Return the program as text that reads as Python; see `blockwright.ir.text`."""
        from .text import program_text

        return program_text(self)

    def structure_hash(self) -> str:
        """Hash graphs and weight shapes, not weight values: 16 hexadecimal digits."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]

    def module(self) -> fx.GraphModule:
        """Return a flat `nn.Module` over shared weights, for execution, training or re-export.

        It takes the tensors of `signature.inputs` (then state) and returns a tuple.
        """
        from .flatten import to_module

        return to_module(self)

    def is_shared(self, slot: str, instance: str | None = None) -> bool:
        """Whether more than one place of the model reads a tensor."""
        name = self.instances[instance].weights[slot] if instance else slot
        return self._readers[name] > 1

    @cached_property
    def _readers(self) -> Counter[str]:
        """How many slots and main nodes read each tensor, each branch for itself."""
        readers = Counter(slot for key in self.scope() for slot in _slots(self.graphs[key]))
        for name, instance in self.instances.items():
            first, *branches = self.scope(name)
            readers.update(instance.weights.values())
            inside = Counter(slot for key in branches for slot in _slots(self.graphs[key]))
            outside = _slots(self.graphs[first]) if inside else ()
            readers.update({instance.weights[s]: n - (s not in outside) for s, n in inside.items()})
        return readers

    def state_dict(self, *, renumbered: bool = False, buffers: bool = False) -> dict[str, Tensor]:
        """Return the parameters by all their names, tied ones under each.

        Args:
            renumbered: Number the blocks without gaps, as a model of as many blocks has them: what
                is left when blocks were dropped then loads into one.
            buffers: Buffers and constants as well.
        """
        from .renumber import renumbered as numbered

        names = {**{name: name for name in self.tensors}, **self.aliases}
        new = numbered(self, names) if renumbered else {name: name for name in names}
        return {
            new[name]: self.tensors[held]
            for name, held in names.items()
            if buffers or held in self.parameters
        }

    def unused_tensors(self) -> set[str]:
        """Name tensors that no graph reads and no state holds."""
        return set(self.tensors) - self._readers.keys() - {slot.name for slot in self.state}

    def require(self, tensor: str) -> Tensor:
        """Return a tensor by any of its names.

        Raises:
            OptionError: The program has no such tensor.
        """
        found = self.tensors.get(self.aliases.get(tensor, tensor))
        if found is None:
            raise OptionError(f"the program has no tensor {tensor!r}.")
        return found


def _slots(graph: fx.Graph) -> tuple[str, ...]:
    """Return the targets of a graph's `get_attr` nodes."""

    def find(graph: fx.Graph) -> tuple[str, ...]:
        return tuple(str(node.target) for node in graph.nodes if node.op == "get_attr")

    return remembered(graph, "slots", find)
