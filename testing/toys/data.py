"""Data that every machine has: the manual inside Python, the digits inside scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data import topics

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...ir.errors import BlockwrightError

VOCAB = 128  # a token is an ASCII code
BLANK = 0  # a code no text contains
CLASSES = 10
SIDE = 8  # height and width of a digit in pixels
VALIDATION_IMAGES = 360
_PLAIN = str.maketrans("‘’“”–—…", "''\"\"--.")


@dataclass(frozen=True)
class Text:
    """English prose and code as ASCII codes, cut once in two.

    Attributes:
        train: The first nine tenths.
        validation: The last tenth. No paragraph of it is in `train`.
    """

    train: Int[Tensor, " characters"]
    validation: Int[Tensor, " characters"]


@dataclass(frozen=True)
class Images:
    """Grey images from -1 to 1 and the digits they show."""

    images: Float[Tensor, "count 1 side side"]
    labels: Int[Tensor, " count"]

    def __len__(self) -> int:
        return len(self.labels)


def text() -> Text:
    """Return the language reference of the running Python, each paragraph once."""
    pages = topics.topics
    paragraphs = "\n\n".join(pages[name] for name in sorted(pages)).split("\n\n")
    tokens = encode("\n\n".join(dict.fromkeys(paragraphs)))
    return Text(*tokens.tensor_split([len(tokens) * 9 // 10]))


def encode(characters: str) -> Int[Tensor, " characters"]:
    """Return ASCII codes; typographic signs become plain ones, other characters question marks."""
    codes = characters.translate(_PLAIN).encode("ascii", "replace")
    return torch.tensor(list(codes), dtype=torch.long)


def windows(
    tokens: Int[Tensor, " characters"], length: int, multiple: int
) -> Int[Tensor, "count length"]:
    """Cut tokens into windows that do not overlap, as many as make whole batches of `multiple`."""
    count = len(tokens) // (length * multiple) * multiple
    return tokens[: count * length].view(count, length)


def digits() -> tuple[Images, Images]:
    """Return 1437 images to train on and 360 to validate with, 8 x 8 pixels, classes balanced.

    Raises:
        BlockwrightError: scikit-learn is not installed.

    Source: Alpaydin and Kaynak, 1998, the test half of "Optical Recognition of Handwritten
        Digits", UCI machine learning repository.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise BlockwrightError(
            "the digits come with scikit-learn, which is not installed.",
            remedy='pip install "blockwright[testing]".',
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    x_train, x_held, y_train, y_held = train_test_split(
        pixels, labels, test_size=VALIDATION_IMAGES, stratify=labels, random_state=0
    )
    return _images(x_train, y_train), _images(x_held, y_held)


def _images(pixels: object, labels: object) -> Images:
    grey = torch.as_tensor(pixels, dtype=torch.float32) / 8 - 1  # they come as 0 to 16
    return Images(grey.view(-1, 1, SIDE, SIDE), torch.as_tensor(labels, dtype=torch.long))
