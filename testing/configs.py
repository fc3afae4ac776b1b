"""A small transformer as plain data.

Configs say everything a model is: architecture, sizes, weights by seed and kind. The first value of
every choice is the simplest one, towards which a failing example shrinks.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Final

FORMS: Final = ("hard", "sdpa", "spelled")
MASKS: Final = ("none", "causal", "padding", "additive")
ROPES: Final = ("none", "half", "interleaved")
ACTIVATIONS: Final = ("identity", "relu", "square", "silu", "gelu", "gelu_tanh")
NORMS: Final = ("none", "rms", "layer")
PLACES: Final = ("pre", "post", "sandwich")
FAMILIES: Final = ("encoder", "decoder", "dit", "mmdit")
HEADS: Final = ("none", "linear", "tied")
DTYPES: Final = ("float32", "float64", "bfloat16")
WEIGHTS: Final = ("ints", "gauss", "grid", "outlier", "low_rank", "zeros", "tiny", "huge")
INPUTS: Final = ("ints", "gauss", "extreme")
LAYOUTS: Final = ("contiguous", "transposed", "expanded")
PADDINGS: Final = ("none", "tail", "all_but_one")


@dataclass(frozen=True)
class AttentionConfig:
    """Multi-head attention; with fewer key than query heads grouped, with one multi-query.

    Attributes:
        kv_heads: Heads of key and value.
        group: Query heads to one key head.
        head_dim: Size of a head; `heads * head_dim` need not be the model's width.
        form: `sdpa` is PyTorch's op, `spelled` a softmax between two products, and `hard` clamps
            scores to -2..2 in place of the softmax, which is exact on integers.
        mask: `padding` and `additive` make an input of the model.
        rope: Rotary embedding of halves or of interleaved pairs.
        rotated: Pairs of features it turns, at most `head_dim // 2`.
        by_hand: Repeat key and value heads by expanding, also where the op could.
        qk_norm: RMS norm of queries and keys.
        bias: Projections have one.
    """

    kv_heads: int = 1
    group: int = 1
    head_dim: int = 2
    form: str = "hard"
    mask: str = "none"
    rope: str = "none"
    rotated: int = 1
    by_hand: bool = False
    qk_norm: bool = False
    bias: bool = False

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group


@dataclass(frozen=True)
class FeedForwardConfig:
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))`.

    Attributes:
        hidden: Neurons.
        activation: One of `ACTIVATIONS`.
        gated: Whether there is a gate.
        bias: Layers have one.
    """

    hidden: int = 1
    activation: str = "identity"
    gated: bool = False
    bias: bool = False


@dataclass(frozen=True)
class BlockConfig:
    """A residual block.

    Attributes:
        attention: None for a block without one.
        ffn: None for a block without one.
        norm: One of `NORMS`.
        place: Norm before the branch, after the sum, or around the branch.
        parallel: Attention and feed-forward read one norm and are added at once.
        spelled: Norms and activations are written out in elementary ops.
        transposed: Linear layers of the feed-forward are `addmm` with the weight the other way.
    """

    attention: AttentionConfig | None = None
    ffn: FeedForwardConfig | None = None
    norm: str = "none"
    place: str = "pre"
    parallel: bool = False
    spelled: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class WeightSpec:
    """How weights are drawn; each from a seed of its own, so that leaving one out moves no other.

    Attributes:
        seed: Any integer.
        kind: `ints` are in -2..2; `grid` are integers whose rows reach `levels`, which rounding to
            that many levels keeps; the others are Gaussian with something odd about them.
        levels: Largest integer of `grid`.
    """

    seed: int = 0
    kind: str = "ints"
    levels: int = 7


@dataclass(frozen=True)
class InputSpec:
    """How inputs are drawn.

    Attributes:
        seed: Any integer.
        kind: `ints` in -2..2, `gauss`, or `extreme` magnitudes.
        layout: Strides of floating-point inputs; `expanded` repeats the first row.
        padding: Which keys a padding mask hides.
    """

    seed: int = 0
    kind: str = "ints"
    layout: str = "contiguous"
    padding: str = "none"


@dataclass(frozen=True)
class ModelConfig:
    """A model.

    Attributes:
        family: `encoder` and `decoder` map tokens or vectors to vectors or logits; `dit` modulates
            its blocks by a condition; `mmdit` has an image and a text stream with joint attention.
        dim: Width.
        vocab: Rows of the embedding table; 0 for a model that takes vectors.
        blocks: Residual blocks; none is legal.
        again: The last block runs a second time, with the same weights.
        final_norm: Norm before the head, `none` or as in the blocks.
        head: Linear layer to `vocab` (or `dim`) values, or the embedding table turned round.
        batch: Example batch size.
        seq: Example sequence length.
        dynamic: Which of `batch` and `seq` are symbolic.
        dtype: Of weights and activations.
        weights: How weights are drawn.
    """

    family: str = "encoder"
    dim: int = 2
    vocab: int = 0
    blocks: tuple[BlockConfig, ...] = ()
    again: bool = False
    final_norm: str = "none"
    head: str = "none"
    batch: int = 2
    seq: int = 3
    dynamic: tuple[str, ...] = ()
    dtype: str = "float32"
    weights: WeightSpec = WeightSpec()

    def masks(self) -> set[str]:
        """Return the kinds of mask its attentions use."""
        return {block.attention.mask for block in self.blocks if block.attention}

    def runs(self) -> tuple[BlockConfig, ...]:
        """Return the blocks in the order they run."""
        return self.blocks + self.blocks[-1:] if self.again else self.blocks


def to_json(config: Any) -> dict[str, Any]:
    """Return a config as plain data, fields at their defaults left out."""
    changed = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != f.default
    }
    return {name: _plain(value) for name, value in changed.items()}


def from_json(kind: type[Any], data: Any) -> Any:
    """Return the config of a kind that `to_json` wrote.

    Raises:
        TypeError: A field is unknown.
    """
    hints = typing.get_type_hints(kind)
    return kind(**{name: _typed(hints.get(name), value) for name, value in data.items()})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    return list(map(_plain, value)) if isinstance(value, tuple) else value


def _typed(hint: Any, value: Any) -> Any:
    members = [hint, *typing.get_args(hint)]
    nested = next((m for m in members if dataclasses.is_dataclass(m)), None)
    if isinstance(value, list):
        return tuple(from_json(nested, v) if isinstance(nested, type) else v for v in value)
    return from_json(nested, value) if isinstance(nested, type) and value is not None else value
