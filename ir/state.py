"""State: values that live from call to call, declared by a pass and threaded through the graphs.

    main:   ..., keys ->  call "blocks.0"(x, keys)  -> y, keys'  -> ..., keys'
    block:  x, keys -> [ what the pass puts here ] -> y, keys'

`with_state` adds a placeholder for the current value and an output for the next one, in main or
in the graph of one block; until something is put between them the value stays as it is. A pass
calls it in `Pass.prepared`, lets its regions take the state with `threaded`, and returns modules
that take the current values behind their other inputs and return the next ones behind their other
outputs. A session of an engine owns the values.

A graph cannot raise. A slot with `faults` is a scalar whose next value says what went wrong, 0 for
nothing: the session then raises, and keeps the state it had. One with a `warning` is said aloud.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx

from .errors import OptionError
from .extend import Extension, Kind, device_of, placeholders
from .graphs import output_nodes
from .program import Program, StateSlot
from .regions import Region, changed
from .shapes import describe

R = TypeVar("R", bound=Region)


@dataclass(frozen=True)
class State:
    """A value that a pass wants to live from call to call.

    Attributes:
        name: Within its graph: `keys`; in main, of the whole program.
        shape: Sizes, all of them known.
        dtype: Element type.
        initial: What every element is at first.
        instance: Block instance whose graph reads and writes it; None for main.
        faults: What went wrong, by its next value, counted from 1; scalars of whole numbers only.
        warning: What to say when its next value is not 0; the value is said behind it.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    initial: float = 0
    instance: str | None = None
    faults: tuple[str, ...] = ()
    warning: str = ""

    @property
    def slot(self) -> str:
        """Its name in the program: `blocks.0.keys`."""
        return f"{self.instance}.{self.name}" if self.instance else self.name


class Thread(NamedTuple):
    """Where a graph has a value that lives from call to call.

    Attributes:
        current: Placeholder of the value before this call.
        following: Node of the value for the next one; None where the graph only reads it.
    """

    current: fx.Node
    following: fx.Node | None


def with_state(program: Program, states: Sequence[State]) -> Program:
    """Return a program that keeps some values from call to call, all of them unchanged so far.

    Args:
        program: What is called. Slots that it has already, and nobody writes, stay.
        states: In the order in which their outputs are added behind the others.

    Raises:
        OptionError: The program keeps something else of that name, or an instance is called in a
            branch, so on some calls only.
    """
    new = [state for state in states if not _is_declared(program, state)]
    if not new:
        return program
    extension = Extension(program)
    for state in new:
        kind = Kind(state.shape, state.dtype)
        inside = None if state.instance is None else (state.instance, state.name)
        extension.keep(state.slot, kind, inside)
    added = extension.finish()
    slots = [
        StateSlot(state.slot, name, output, state.faults, state.warning)
        for state, (name, output) in zip(new, extension.kept, strict=True)
    ]
    tensors = {
        state.slot: torch.full((), state.initial, dtype=state.dtype, device=device_of(added.main))
        for state in new
    }
    return added.with_(tensors={**program.tensors, **tensors}, state=(*program.state, *slots))


def shared(program: Program, name: str, instances: Iterable[str]) -> Program:
    """Return a program in which blocks read an input of main: an argument, or state of main.

    Args:
        program: What is called.
        name: Of the placeholder of main, and of those in the graphs of blocks; see `threads`.
        instances: Which blocks. Those that have an input of this name already stay as they are.

    Raises:
        OptionError: Main has no such input, or an instance is called in a branch.
    """
    if name not in {node.name for node in placeholders(program.main)}:
        raise OptionError(f"the program has no input {name!r}.")
    missing = [i for i in instances if name not in threads(program, i)]
    if not missing:
        return program
    extended = Extension(program)
    for instance in missing:
        extended.read(name, instance)
    return extended.finish()


def threads(program: Program, instance: str | None = None) -> dict[str, Thread]:
    """Return the state that a graph has, by its name there, and inputs of main that it reads.

    Args:
        program: What is called.
        instance: Block instance; None for main.
    """
    outputs, slots = output_nodes(program.main), {slot.input: slot for slot in program.state}
    places = {node.name: node for node in placeholders(program.main)}
    if instance is None:
        return {s.name: Thread(places[s.input], outputs[s.output]) for s in slots.values()}
    call = program.call(instance)
    results = output_nodes(program.graphs[program.instances[instance].block])
    block = placeholders(program.graphs[program.instances[instance].block])
    found: dict[str, Thread] = {}
    for place, given in zip(block, call.args, strict=True):
        if not isinstance(given, fx.Node) or places.get(given.name) is not given:
            continue
        slot = slots.get(given.name)
        if slot is None or not slot.name.startswith(f"{instance}."):
            found[given.name] = Thread(place, None)
            continue
        made: Any = outputs[slot.output]
        following = results[made.args[1]] if made.args[:1] == (call,) else None
        found[slot.name.removeprefix(f"{instance}.")] = Thread(place, following)
    return found


def threaded(region: R, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> R:
    """Return a region that takes state: its module gets and returns more.

    Args:
        region: In main or in a block instance; not in a branch.
        reads: Names whose current values become the last inputs, in this order.
        writes: Names whose next values become the last outputs. No two regions write the same.
    """
    known = threads(region.program, region.instance)
    following = [node for name in writes if (node := known[name].following) is not None]
    assert len(following) == len(writes), f"{region.label} writes what it may only read"
    return changed(
        region,
        nodes=(*region.nodes, *following),
        inputs=(*region.inputs, *(known[name].current for name in reads)),
        outputs=(*region.outputs, *following),
    )


def complaint(program: Program) -> str | None:
    """Say what is wrong with the state of a program; None when all is well."""
    outputs = output_nodes(program.main)
    places = {node.name: node for node in placeholders(program.main)}
    if len({slot.name for slot in program.state}) < len(program.state):
        return "two states have one name"
    for slot in program.state:
        tensor, place = program.tensors.get(slot.name), places.get(slot.input)
        if tensor is None or place is None or not 0 <= slot.output < len(outputs):
            return f"the state {slot.name!r} has no initial value, no input or no output"
        value = place.meta["val"]
        if describe(outputs[slot.output].meta["val"]) != describe(value):
            return f"the state {slot.name!r} comes out as something else than it went in"
        fits = tensor.dtype == value.dtype and tensor.dim() in (0, value.dim())
        if not fits or (tensor.dim() and tensor.shape != value.shape):
            return f"the state {slot.name!r} begins as something else than it goes on"
        whole = not (value.is_floating_point() or value.is_complex())
        if (slot.faults or slot.warning) and (value.dim() or (slot.faults and not whole)):
            return f"the state {slot.name!r} tells of faults and is no number"
    return None


def _is_declared(program: Program, state: State) -> bool:
    """Whether a program keeps a state already and leaves it as it is."""
    if state.slot not in program.tensors and state.slot not in program.aliases:
        return False
    slot = next((slot for slot in program.state if slot.name == state.slot), None)
    thread = threads(program, state.instance).get(state.name) if slot else None
    idle = thread is not None and thread.following is not None
    if not idle or thread.following.args != (thread.current,):  # type: ignore[union-attr]
        raise OptionError(
            f"the program keeps something called {state.slot!r} already.",
            remedy="run the pass once, or give its state another name.",
        )
    return True
