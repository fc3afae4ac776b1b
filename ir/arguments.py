"""Give a program another argument."""

from __future__ import annotations

from dataclasses import replace

import torch

from .errors import OptionError
from .graphs import copy_graph
from .program import MAIN, Program
from .shapes import fake_mode
from .signature import Argument, TensorSpec
from .structure import Structure


def with_argument(
    program: Program, name: str, dtype: torch.dtype = torch.int64, shape: tuple[int, ...] = ()
) -> Program:
    """Return the program with one more argument, its last; one that has it stays as it is.

    Inputs that were made for the program before still fit: see `Program.completed`.

    Args:
        program: What is called.
        name: Of the argument, and of main's placeholder.
        dtype: Element type.
        shape: Sizes, none for a scalar.

    Raises:
        OptionError: The program has an argument of this name that is something else.
    """
    known = next((spec for spec in program.signature.inputs if spec.name == name), None)
    if known is not None and (known.dtype, known.shape) == (dtype, shape):
        return program
    names = {argument.name for argument in program.signature.arguments}
    if name in names | set(program.signature.parameters) | {n.name for n in program.main.nodes}:
        raise OptionError(
            f"the model has something called {name!r} already.", remedy="use another name."
        )
    graph = copy_graph(program.main)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        place = graph.placeholder(name)
    with fake_mode(graph):
        place.meta["val"] = torch.empty(shape, dtype=dtype, device=last.meta["val"].device)
    argument = Argument(name, False, Structure("leaf"), (TensorSpec(name, dtype, shape),))
    signature = replace(
        program.signature,
        arguments=(*program.signature.arguments, argument),
        parameters=(*program.signature.parameters, name),
    )
    return program.with_(graphs={**program.graphs, MAIN: graph}, signature=signature)
