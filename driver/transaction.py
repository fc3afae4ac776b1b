"""Keep a pass from leaving traces of itself, whether it succeeds or fails.

Programs do not change, so going back is free. What a pass can still reach is the random state of
the process, which is set for it and put back, and the memory of weights that old and new program
share, which is watched.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..ir.errors import VerifyError
from ..ir.program import Program


@contextlib.contextmanager
def transaction(program: Program, by: str, seed: int) -> Iterator[None]:
    """Run a pass on a program with random numbers of its own.

    Raises:
        VerifyError: It wrote into a weight of the program.
    """
    before = {name: _version(tensor) for name, tensor in program.tensors.items()}
    with _random_state(seed):
        yield
    for name, tensor in program.tensors.items():
        if _version(tensor) != before[name]:
            raise VerifyError(
                f"{by} wrote into the weight {name!r} of the program it was given.",
                where=name,
                remedy="clone a weight before changing it; load the model again, it has changed.",
            )


@contextlib.contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Seed every generator a pass may draw from, and put the old states back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=list(devices)):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _version(tensor: Tensor) -> int:
    """Count the writes into a tensor's memory that torch knows of."""
    return 0 if tensor.is_inference() else tensor._version
