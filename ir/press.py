"""Run one block of each kind while a model is exported, and note down the calls of the others.

`torch.export` takes milliseconds per node. While a press is open, the first block of each kind
runs, framed by two marks in the graph. A call of any other one is a note: which block, and what it
was given. What such a call returns are tensors without values, which only the next block usually
sees. When anything else is about to run, one mark settles all notes so far, so order is kept.

    enter -> ops of the first block -> leave -> calls(all other blocks, one after the other) -> ...
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from .blueprint import walk
from .contents import Opaque, contents
from .hidden import Frozen, Unfit, hidden
from .marks import Call, Given, Kind, Mark, Value, put, recorded
from .repeats import Group, Member
from .shapes import describe
from .watched import Watched, was_used


@dataclass(eq=False)
class Press:
    """Diverts the blocks of some groups while open, and remembers what it saw.

    Attributes:
        groups: Which blocks.
        marks: One for each mark in the graph, in order.
        calls: Every call of a block that did not run, in order.
        unfit: Positions of groups that must be captured flat.
    """

    groups: Sequence[Group]
    marks: list[Mark] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    unfit: set[int] = field(default_factory=set)
    _kinds: dict[int, Kind] = field(default_factory=dict)
    _values: Any = field(default_factory=WeakIdKeyDictionary)
    _settling: bool = False
    _running: bool = False

    @contextlib.contextmanager
    def open(self, model: nn.Module) -> Iterator[None]:
        """Divert the blocks' `forward`, and hide what is inside those that will not run."""
        idle = [member.block for group in self.groups for member in group.members[1:]]
        with contextlib.ExitStack() as undo:
            undo.enter_context(recorded(self.marks))
            undo.callback(model.register_forward_pre_hook(self._first).remove)
            undo.callback(model.register_forward_hook(self._last).remove)
            undo.enter_context(hidden(idle, lambda: self._running))
            watched = [_watch(group, undo) for group in self.groups]
            for number, group in enumerate(self.groups):
                for member in group.members:
                    self._divert(number, member, undo)
            undo.enter_context(_Settling(self))
            yield
            for number, numbers in enumerate(watched):
                if any(map(was_used, numbers)):
                    self._refuse(number, f"{self.groups[number].members[0].path} uses its number")

    def _divert(self, number: int, member: Member, undo: contextlib.ExitStack) -> None:
        path, block, built = member
        forward, first = block.forward, member is self.groups[number].members[0]

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not before.holds():
                self._refuse(number, f"{path} was changed by something outside")
            given = self._given(number, path, args, kwargs)
            kind = self._kinds.get(number)
            if first:
                if kind is not None:
                    self._refuse(number, f"{path} is called twice")
                self._kinds[number] = kind = Kind(number, block, path, given)
                return self._run(kind, forward, before)
            if kind is None or given.key != kind.given.key:
                self._refuse(number, f"{path} is called with other arguments than the first")
            return self._note(kind, member, given.tensors)

        block.forward = run
        undo.callback(block.__dict__.pop, "forward")
        before = Frozen.of(list(walk(block)), built.mutable)

    def _given(self, number: int, path: str, args: Any, kwargs: Any) -> Given:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        constants = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        if any(isinstance(leaf, torch.SymInt) for leaf in constants):
            self._refuse(number, f"{path} takes a size as argument")
        read = tuple(contents(leaf, {}) for leaf in constants)
        if Opaque.within(read):
            self._refuse(number, f"{path} takes an argument that cannot be read")
        with torch._C.DisableTorchFunction():
            shapes = [describe(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
            return Given(leaves, spec, (spec, read, *shapes))

    def _run(self, kind: Kind, forward: Callable[..., Any], before: Frozen) -> Any:
        """Run a block between two marks."""
        inside = put(Mark(kind, "enter"), kind.given.tensors)
        new = iter(inside)
        given = [next(new) if isinstance(x, Tensor) else x for x in kind.given.leaves]
        args, kwargs = pytree.tree_unflatten(given, kind.given.spec)
        results, kind.returned = pytree.tree_flatten(forward(*args, **kwargs))
        after = pytree.tree_leaves((args, kwargs))
        if len(after) != len(given) or any(map(operator.is_not, after, given)):
            self._refuse(kind.number, f"{kind.path} changes its arguments")
        if not before.holds():
            self._refuse(kind.number, f"{kind.path} changes its own attributes")
        if not all(x is None or isinstance(x, Tensor) for x in results):
            self._refuse(kind.number, f"{kind.path} returns something else than tensors")
        position = {id(tensor): index for index, tensor in enumerate(inside)}
        kind.results = [position.get(id(x), x) for x in results]
        return kind.pack(kind.given.tensors, put(Mark(kind, "leave"), kind.outputs))

    def _note(self, kind: Kind, member: Member, tensors: Sequence[Tensor]) -> Any:
        """Note a call down, and return tensors that only stand for its outputs."""
        inputs = [self._values.get(tensor, tensor) for tensor in tensors]
        call = Call(kind, member.path, member.block, inputs, len(self.calls))
        self.calls.append(call)
        outputs = list(map(_shadow, kind.outputs))
        for index, output in enumerate(outputs):
            self._values[output] = Value(call, index)
        return kind.pack(tensors, outputs)

    def _real(self, nested: Any) -> Any:
        """Return a nested value with tensors of the graph in place of what stands for them."""
        if not self._values or self._settling:
            return nested
        self._settling = True
        waiting = {value.call for value in self._values.values() if value.call.settled is None}
        for call in sorted(waiting, key=lambda call: call.number):
            self._settle(call)
        self._settling = False

        def real(tensor: Tensor) -> Tensor:
            value = self._values.get(tensor)
            return tensor if value is None else value.settled

        return pytree.tree_map_only(Tensor, real, nested)

    def _first(self, _model: nn.Module, _args: Any) -> None:
        self._running = True

    def _last(self, _model: nn.Module, _args: Any, output: Any) -> Any:
        self._running = False
        output = self._real(output)
        self._values.clear()
        return output

    def _settle(self, last: Call) -> None:
        """Put one mark in the graph for a call and all calls it waits for."""
        calls, leaves = {last}, dict[int, Tensor]()
        stack = [last]
        while stack:
            for source in stack.pop().inputs:
                if isinstance(source, Value) and source.call.settled is None:
                    if source.call not in calls:
                        calls.add(source.call)
                        stack.append(source.call)
                else:
                    tensor = source.settled if isinstance(source, Value) else source
                    leaves[id(tensor)] = tensor
        ordered = sorted(calls, key=lambda call: call.number)
        entry = Mark(last.kind, "calls", ordered, list(leaves))
        last.settled = put(entry, list(leaves.values()))

    def _refuse(self, number: int, reason: str) -> NoReturn:
        self.unfit.add(number)
        self._values.clear()
        self._running = False
        raise Unfit(reason)


def _watch(group: Group, undo: contextlib.ExitStack) -> list[Watched]:
    """Put a number that is watched in the place of each that counts the blocks."""
    inside = list(walk(group.members[0].block))
    watched = []
    for place, name, value in group.numbering:
        table = inside[place].__dict__
        undo.callback(table.__setitem__, name, value)
        table[name] = Watched(value)
        watched.append(table[name])
    return watched


class _Settling(TorchFunctionMode):
    """Puts notes into the graph before anything else goes there."""

    def __init__(self, press: Press) -> None:
        super().__init__()
        self.press = press

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _METADATA:
            args, kwargs = self.press._real((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _shadow(like: FakeTensor) -> FakeTensor:
    """Return a tensor like another one that no graph knows."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        return FakeTensor(like.fake_mode, like.detach(), like.fake_device)


_METADATA = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")
)
