"""Find the parts of a model by dataflow: never by class, parameter or module names."""

from .attention import Attention
from .block import Block, Sublayer
from .constant import ConstantExpression
from .embedding import Embedding
from .explain import Explanation, explain
from .feed_forward import FeedForward
from .flow import NotRecognized
from .layer import Layer
from .linear import Linear, Projections
from .norm import Norm

__all__ = [
    "Attention",
    "Block",
    "ConstantExpression",
    "Embedding",
    "Explanation",
    "FeedForward",
    "Layer",
    "Linear",
    "Norm",
    "NotRecognized",
    "Projections",
    "Sublayer",
    "explain",
]
