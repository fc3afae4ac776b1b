"""Trained weights on disk, so that a toy is trained once per machine and not once per test.

    $BLOCKWRIGHT_CACHE, $XDG_CACHE_HOME/blockwright or ~/.cache/blockwright
        toys/NAME-HASH/weights.safetensors

The hash stands for all that the weights depend on, so nothing is ever stale; only old folders are
left behind, and deleting any of them is safe.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...backends import disk
from .toy import AnyModel

FILE = "weights.safetensors"


def trained(
    name: str, build: Callable[[], AnyModel], train: Callable[[], AnyModel], *origins: object
) -> AnyModel:
    """Return a trained model: from disk, or trained now and stored.

    One process trains, others that ask for the same model wait for it and read. A damaged file
    counts as none.

    Args:
        name: Begins the name of the folder.
        build: Returns the model with any weights.
        train: Returns the model with trained weights.
        *origins: What the weights depend on: modules count by their source, the rest by `repr`.

    Raises:
        ArtefactError: The cache cannot be written.
        OSError: Its folder cannot be made.
    """
    folder = home() / "toys" / f"{name}-{digest_of(*origins)}"
    folder.mkdir(parents=True, exist_ok=True)
    with disk.locked(folder):
        stored = read(folder / FILE)
        if stored is None:
            model = train()
            write(folder / FILE, weights(model))
            return model
    model = build().eval()
    with torch.no_grad():
        for key, parameter in weights(model).items():
            parameter.copy_(stored[key])
    return model


def home() -> Path:
    """Return the folder of everything blockwright may recompute."""
    if chosen := os.environ.get("BLOCKWRIGHT_CACHE"):
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "blockwright"


def digest_of(*origins: object) -> str:
    """Return a short hash of origins and of the versions that the numbers depend on."""
    versions = torch.__version__, platform.python_version()
    parts = [inspect.getsource(o) if isinstance(o, ModuleType) else repr(o) for o in origins]
    return hashlib.sha256("\0".join((*versions, *parts)).encode()).hexdigest()[:16]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model, one that has two names under its first."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Store tensors together with their hash: all of them or, if that fails, nothing."""
    disk.replace_file(path, [save(dict(tensors), {"sha256": _sha256(tensors)})])


def read(path: Path) -> dict[str, Tensor] | None:
    """Return stored tensors, or None if there is no file or not the one that was written."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return tensors if _sha256(tensors) == expected else None


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save(dict(tensors))).hexdigest()
