"""What authors of passes test with: random valid transformers and a conformance suite.

from blockwright.testing import pass_suite
from mypackage import MyPass

TestMyPass = pass_suite(MyPass(level=2), exact=MyPass(level=0))  # one test per property

Needs `hypothesis` and `pytest`.
"""

from .build_module import to_module
from .build_program import to_program
from .configs import (
    AttentionConfig,
    BlockConfig,
    FeedForwardConfig,
    InputSpec,
    ModelConfig,
    WeightSpec,
)
from .conformance import check_pass, pass_suite, replay

__all__ = [
    "AttentionConfig",
    "BlockConfig",
    "FeedForwardConfig",
    "InputSpec",
    "ModelConfig",
    "WeightSpec",
    "check_pass",
    "pass_suite",
    "replay",
    "to_module",
    "to_program",
]
