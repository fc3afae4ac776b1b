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
from .driver.generate import generate
from .driver.recover import Recover
from .driver.verify_foreign import verify
from .ir.capture import capture
from .ir.errors import BlockwrightError
from .passes import (
    Canonicalize,
    DeltaCache,
    DenseToMoE,
    DropBlocks,
    DropIdleFeatures,
    DropSublayers,
    EmergentMoE,
    FoldConstants,
    FuseBlocks,
    FuseProjections,
    HardAttention,
    HashedLinearAttention,
    HashLinear,
    JointAttention,
    KVCache,
    LinearizeStreams,
    LinearizeSublayers,
    LoopBlocks,
    MixtureOfBlocks,
    PiecewiseAttention,
    ProxyAttention,
    PruneAccuracyDriven,
    PruneContiguous,
    PruneHeads,
    PruneNeurons,
    QuantizeBlockwise,
    QuantizeWeights,
    ReuseCache,
    SceneMaskAttention,
    ShareBlocks,
    ShareModulation,
    SkipBricks,
    SparseGlobalAttention,
    StripAttention,
    TaylorCache,
    WindowAttention,
)
from .passes.shared.to_dense import to_dense

__version__ = "0.1.0"
__all__ = [
    "BlockwrightError",
    "Canonicalize",
    "DeltaCache",
    "DenseToMoE",
    "DropBlocks",
    "DropIdleFeatures",
    "DropSublayers",
    "EmergentMoE",
    "Engine",
    "FoldConstants",
    "FuseBlocks",
    "FuseProjections",
    "HardAttention",
    "HashLinear",
    "HashedLinearAttention",
    "JointAttention",
    "KVCache",
    "LinearizeStreams",
    "LinearizeSublayers",
    "LoopBlocks",
    "MixtureOfBlocks",
    "PiecewiseAttention",
    "ProxyAttention",
    "PruneAccuracyDriven",
    "PruneContiguous",
    "PruneHeads",
    "PruneNeurons",
    "QuantizeBlockwise",
    "QuantizeWeights",
    "Recover",
    "ReuseCache",
    "SceneMaskAttention",
    "Session",
    "ShareBlocks",
    "ShareModulation",
    "SkipBricks",
    "SparseGlobalAttention",
    "StripAttention",
    "TaylorCache",
    "WindowAttention",
    "capture",
    "compile",
    "generate",
    "load",
    "to_dense",
    "verify",
]
