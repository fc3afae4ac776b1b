"""Bring a model into the state it is captured in, and back."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from .blueprint import walk
from .errors import CaptureError


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Capture in eval mode; leave every submodule's flag as it was."""
    training = [module for module in walk(model) if module.training]
    try:
        if training:
            _eval(model)
        yield
    finally:
        for module in training:
            module.training = True


def _eval(model: nn.Module) -> None:
    try:
        model.eval()
    except RecursionError as error:
        raise CaptureError(
            f"the modules of {type(model).__name__} are nested too deep for Python.",
            remedy="raise sys.setrecursionlimit, or put fewer modules into each other.",
        ) from error


@contextlib.contextmanager
def without_cache(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[list[str]]:
    """Switch off the cache object a Hugging Face model would return, which no graph can hold."""
    notes: list[str] = []
    configs = {id(config): config for module in walk(model) for config in _configs(module)}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    if kwargs.get("use_cache") or not caching:
        yield notes
        return
    if "past_key_values" in parameter_names(model.forward):
        notes.append("the model's cache object (past_key_values) is not among the outputs.")
    try:
        for config in caching:
            config.use_cache = False
        yield notes
    finally:
        for config in caching:
            config.use_cache = True


def _configs(module: nn.Module) -> list[Any]:
    config: Any = vars(module).get("config")
    return [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]


def parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Name the parameters that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(
        name for name, p in inspect.signature(forward).parameters.items() if p.kind in kinds
    )
