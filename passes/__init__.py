"""The register: one published method per file, in alphabetical order."""

from .base import Pass, Plan, Promise, Skip
from .canonicalize import Canonicalize
from .delta_cache import DeltaCache
from .dense_to_moe import DenseToMoE
from .drop_blocks import DropBlocks
from .drop_idle_features import DropIdleFeatures
from .drop_sublayers import DropSublayers
from .emergent_moe import EmergentMoE
from .fold_constants import FoldConstants
from .fuse_blocks import FuseBlocks
from .fuse_projections import FuseProjections
from .hard_attention import HardAttention
from .hash_linear import HashLinear
from .hashed_linear_attention import HashedLinearAttention
from .joint_attention import JointAttention
from .kv_cache import KVCache
from .linearize_streams import LinearizeStreams
from .linearize_sublayers import LinearizeSublayers
from .loop_blocks import LoopBlocks
from .mixture_of_blocks import MixtureOfBlocks
from .piecewise_attention import PiecewiseAttention
from .proxy_attention import ProxyAttention
from .prune_accuracy_driven import PruneAccuracyDriven
from .prune_contiguous import PruneContiguous
from .prune_heads import PruneHeads
from .prune_neurons import PruneNeurons
from .quantize_blockwise import QuantizeBlockwise
from .quantize_weights import QuantizeWeights
from .reuse_cache import ReuseCache
from .scene_mask_attention import SceneMaskAttention
from .share_blocks import ShareBlocks
from .share_modulation import ShareModulation
from .skip_bricks import SkipBricks
from .sparse_global_attention import SparseGlobalAttention
from .strip_attention import StripAttention
from .taylor_cache import TaylorCache
from .window_attention import WindowAttention

PASSES: tuple[type[Pass], ...] = (  # type: ignore[type-arg]
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
    HashLinear,
    HashedLinearAttention,
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

__all__ = [
    "PASSES",
    "Canonicalize",
    "DeltaCache",
    "DenseToMoE",
    "DropBlocks",
    "DropIdleFeatures",
    "DropSublayers",
    "EmergentMoE",
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
    "Pass",
    "PiecewiseAttention",
    "Plan",
    "Promise",
    "ProxyAttention",
    "PruneAccuracyDriven",
    "PruneContiguous",
    "PruneHeads",
    "PruneNeurons",
    "QuantizeBlockwise",
    "QuantizeWeights",
    "ReuseCache",
    "SceneMaskAttention",
    "ShareBlocks",
    "ShareModulation",
    "Skip",
    "SkipBricks",
    "SparseGlobalAttention",
    "StripAttention",
    "TaylorCache",
    "WindowAttention",
]
