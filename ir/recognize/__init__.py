"""Find the parts of a model by dataflow: never by class, parameter or module names."""

from .attention import Attention, Stream
from .block import Block, BlockStream, Sublayer
from .branch import Branch
from .constant import ConstantExpression
from .coupled import Coupled, coupled_heads, coupled_neurons
from .embedding import Embedding, Stem
from .experts import Experts
from .explain import Explanation, explain
from .feed_forward import FeedForward
from .flow import NotRecognized
from .head import Head
from .layer import Layer
from .linear import Linear, Projections
from .modulation import Chunk, Modulation
from .norm import Norm
from .place import Place
from .residual import Residual
from .rotary import Rotary
from .stack import Stack
from .stacked import StackedWeight
from .summand import Summand
from .summary import BlockClass, block_classes

__all__ = [
    "Attention",
    "Block",
    "BlockClass",
    "BlockStream",
    "Branch",
    "Chunk",
    "ConstantExpression",
    "Coupled",
    "Embedding",
    "Experts",
    "Explanation",
    "FeedForward",
    "Head",
    "Layer",
    "Linear",
    "Modulation",
    "Norm",
    "NotRecognized",
    "Place",
    "Projections",
    "Residual",
    "Rotary",
    "Stack",
    "StackedWeight",
    "Stem",
    "Stream",
    "Sublayer",
    "Summand",
    "block_classes",
    "coupled_heads",
    "coupled_neurons",
    "explain",
]
