"""Compile the structure of transformers.

import blockwright as bw

engine = bw.compile(model, passes=[bw.FuseProjections(), bw.QuantizeWeights(bits=8)],
example_inputs=(x,))
y = engine(x)
print(engine.report)
engine.save("model.bw")
engine = bw.load("model.bw")
"""

from .backends.artefact import load
from .backends.engine import Engine, Session
from .driver.compile import compile
from .driver.verify_foreign import verify
from .ir.capture import capture
from .ir.errors import BlockwrightError
from .passes import Canonicalize, FoldConstants, FuseProjections, QuantizeWeights

__version__ = "0.1.0"
__all__ = [
    "BlockwrightError",
    "Canonicalize",
    "Engine",
    "FoldConstants",
    "FuseProjections",
    "QuantizeWeights",
    "Session",
    "capture",
    "compile",
    "load",
    "verify",
]
