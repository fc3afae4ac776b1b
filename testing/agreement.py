"""Capture must make of a module what `to_program` says (K0); the other tests then skip capture."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.export import Dim

from ..ir.capture import capture
from ..ir.program import Program
from .build_module import to_module
from .case import built, outputs
from .configs import InputSpec, ModelConfig
from .fakes import LIMIT
from .tolerance import t0
from .values import input_shapes, inputs_of


def captured(config: ModelConfig) -> Program:
    """Return the model as capture sees it."""
    sizes = {name: Dim(name, min=1, max=LIMIT) for name in config.dynamic}
    shapes = {
        name: {axis: sizes[size] for axis, size in enumerate(shape) if size in sizes}
        for name, shape in input_shapes(config, "batch", "seq").items()
    }
    inputs = inputs_of(config, InputSpec())
    return capture(to_module(config), inputs, dynamic_shapes=shapes if sizes else None)


def capture_agrees(config: ModelConfig) -> None:
    """Ask that a captured module is the program built directly.

    Raises:
        AssertionError: Text, signature, tensors, ties or numbers differ.
    """
    ours, theirs = built(config), captured(config)
    assert theirs.text() == ours.text()
    assert replace(theirs.signature, symbols={}) == replace(ours.signature, symbols={})
    assert theirs.tensors.keys() == ours.tensors.keys()
    assert (theirs.aliases, theirs.parameters) == (ours.aliases, ours.parameters)
    for name, tensor in ours.tensors.items():
        t0([theirs.tensors[name]], [tensor], name)
    given = inputs_of(config, InputSpec(kind="gauss"))
    flat = list(given.values())
    t0(outputs(theirs, flat), outputs(ours, flat))
    with torch.no_grad():
        t0([to_module(config)(**given)], outputs(ours, flat))
