"""Small models trained on the spot, and figures of how good they are.

    toy = toys.gpt()
    toy.quality()                  # {"bits_per_character": ...}
    toy.quality(engine)            # the same, of anything called like the model

The first call trains, one to three minutes on one core; later ones read the weights from a cache.
"""

from .drawing import dit
from .language import deep_gpt, gpt, llama
from .masked import bert
from .painting import flux
from .sampling import sample
from .toy import Task, Toy
from .vision import vit

__all__ = ["Task", "Toy", "bert", "deep_gpt", "dit", "flux", "gpt", "llama", "sample", "vit"]
