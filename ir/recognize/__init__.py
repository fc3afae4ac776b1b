"""Find the parts of a model by dataflow: never by class, parameter or module names."""

from .constant import ConstantExpression
from .embedding import Embedding
from .linear import Linear, Projections

__all__ = ["ConstantExpression", "Embedding", "Linear", "Projections"]
