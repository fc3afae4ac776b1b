"""The register: one published method per file, in alphabetical order."""

from .base import Pass, Plan, Promise, Skip
from .canonicalize import Canonicalize
from .dense_to_moe import DenseToMoE
from .drop_blocks import DropBlocks
from .drop_idle_features import DropIdleFeatures
from .drop_sublayers import DropSublayers
from .emergent_moe import EmergentMoE
from .fold_constants import FoldConstants
from .fuse_blocks import FuseBlocks
from .fuse_projections import FuseProjections
from .hard_attention import HardAttention
from .linearize_streams import LinearizeStreams
from .linearize_sublayers import LinearizeSublayers
from .loop_blocks import LoopBlocks
from .mixture_of_blocks import MixtureOfBlocks
from .prune_accuracy_driven import PruneAccuracyDriven
from .prune_contiguous import PruneContiguous
from .prune_heads import PruneHeads
from .prune_neurons import PruneNeurons
from .quantize_weights import QuantizeWeights
from .share_blocks import ShareBlocks
from .share_modulation import ShareModulation
from .skip_bricks import SkipBricks

PASSES: tuple[type[Pass], ...] = (  # type: ignore[type-arg]
    Canonicalize,
    DenseToMoE,
    DropBlocks,
    DropIdleFeatures,
    DropSublayers,
    EmergentMoE,
    FoldConstants,
    FuseBlocks,
    FuseProjections,
    HardAttention,
    LinearizeStreams,
    LinearizeSublayers,
    LoopBlocks,
    MixtureOfBlocks,
    PruneAccuracyDriven,
    PruneContiguous,
    PruneHeads,
    PruneNeurons,
    QuantizeWeights,
    ShareBlocks,
    ShareModulation,
    SkipBricks,
)

__all__ = [
    "PASSES",
    "Canonicalize",
    "DenseToMoE",
    "DropBlocks",
    "DropIdleFeatures",
    "DropSublayers",
    "EmergentMoE",
    "FoldConstants",
    "FuseBlocks",
    "FuseProjections",
    "HardAttention",
    "LinearizeStreams",
    "LinearizeSublayers",
    "LoopBlocks",
    "MixtureOfBlocks",
    "Pass",
    "Plan",
    "Promise",
    "PruneAccuracyDriven",
    "PruneContiguous",
    "PruneHeads",
    "PruneNeurons",
    "QuantizeWeights",
    "ShareBlocks",
    "ShareModulation",
    "Skip",
    "SkipBricks",
]
