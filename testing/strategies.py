"""Random valid transformers, inputs for them, and what to shrink them to.

Configs are valid as they are drawn: sizes that depend on others are derived, nothing is filtered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from . import configs as c
from .configs import AttentionConfig, BlockConfig, FeedForwardConfig, InputSpec, ModelConfig
from .fakes import SIZES

Draw = Any
EXACT_ACTIVATIONS = ("identity", "relu", "square")
seeds = st.integers(0, 2**16)


@st.composite
def attentions(
    draw: Draw, *, masks: Sequence[str] = c.MASKS, exact: bool = False
) -> AttentionConfig:
    """Draw attentions; `exact` ones compute integers from integers."""
    head_dim = draw(st.sampled_from([2, 4, 1, 3, 8]))
    ropes = c.ROPES if head_dim > 1 and not exact else ("none",)
    return AttentionConfig(
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        head_dim=head_dim,
        form=draw(st.sampled_from(c.FORMS[:1] if exact else c.FORMS)),
        mask=draw(st.sampled_from(masks)),
        rope=draw(st.sampled_from(ropes)),
        rotated=draw(st.integers(1, max(1, head_dim // 2))),
        by_hand=draw(st.booleans()),
        qk_norm=draw(st.booleans()) and not exact,
        bias=draw(st.booleans()),
    )


@st.composite
def feed_forwards(
    draw: Draw, *, activations: Sequence[str] = c.ACTIVATIONS, gated: bool = True
) -> FeedForwardConfig:
    """Draw feed-forward networks; sizes are odd and prime, too."""
    return FeedForwardConfig(
        hidden=draw(st.sampled_from([1, 2, 3, 8, 5, 33])),
        activation=draw(st.sampled_from(activations)),
        gated=gated and draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@st.composite
def blocks(draw: Draw, *, masks: Sequence[str] = c.MASKS) -> BlockConfig:
    """Draw residual blocks; one half, or both, may be missing."""
    return BlockConfig(
        attention=draw(st.none() | attentions(masks=masks)),
        ffn=draw(st.none() | feed_forwards()),
        norm=draw(st.sampled_from(c.NORMS)),
        place=draw(st.sampled_from(c.PLACES)),
        parallel=draw(st.booleans()),
        spelled=draw(st.booleans()),
        transposed=draw(st.booleans()),
    )


@st.composite
def models(
    draw: Draw,
    *,
    families: Sequence[str] = c.FAMILIES,
    dynamic: bool | None = None,
    vocab: Sequence[int] = (0, 5, 7),
    rows: int = 1,
) -> ModelConfig:
    """Draw models.

    Args:
        draw: Given by hypothesis.
        families: Which families.
        dynamic: Whether some dimension is; drawn when left out.
        vocab: Sizes of embedding tables; 0 for models that take vectors.
        rows: Smallest batch.
    """
    family = draw(st.sampled_from(families))
    modulated = family in ("dit", "mmdit")
    masks = {"mmdit": ("none",), "decoder": ("causal", "additive", "padding")}.get(family, c.MASKS)
    parts: list[BlockConfig] = []
    for part, times in draw(
        st.lists(st.tuples(blocks(masks=masks), st.integers(1, 3)), max_size=2)
    ):
        parts += [_fitting(part, modulated)] * times
    table = 0 if modulated else draw(st.sampled_from(vocab))
    model = ModelConfig(
        family=family,
        dim=draw(st.sampled_from([2, 4, 1, 3, 8])),
        vocab=table,
        blocks=tuple(parts),
        again=bool(parts) and draw(st.booleans()),
        final_norm=draw(st.sampled_from(c.NORMS)),
        head=draw(st.sampled_from(c.HEADS if table else c.HEADS[:2])),
        dtype=draw(st.sampled_from(c.DTYPES)),
        weights=draw(weights()),
    )
    return draw(sized(model, dynamic=dynamic, rows=rows))


@st.composite
def exact_models(draw: Draw, *, levels: int | None = None) -> ModelConfig:
    """Draw models that compute integers: no norm, no softmax, activations that are polynomials.

    Squares grow fast; models that have them have one block.

    Args:
        draw: Given by hypothesis.
        levels: Draw weights on a grid of so many levels; -2..2 when left out.
    """
    family = draw(st.sampled_from(c.FAMILIES))
    modulated = family in ("dit", "mmdit")
    masks = ("none",) if family == "mmdit" else c.MASKS
    depth = draw(st.integers(0, 2))
    grows = depth < 2 and not modulated and levels is None
    part = BlockConfig(
        attention=draw(st.none() | attentions(masks=masks, exact=True)),
        ffn=draw(
            st.none()
            | feed_forwards(
                activations=EXACT_ACTIVATIONS if grows else EXACT_ACTIVATIONS[:2], gated=grows
            )
        ),
        parallel=draw(st.booleans()),
        transposed=draw(st.booleans()),
    )
    table = 0 if modulated else draw(st.sampled_from([0, 5]))
    model = ModelConfig(
        family=family,
        dim=draw(st.sampled_from([2, 4, 1, 3])),
        vocab=table,
        blocks=(_fitting(part, modulated),) * depth,
        head=draw(st.sampled_from(c.HEADS if table else c.HEADS[:2])),
        dtype="float64",
        weights=c.WeightSpec(draw(seeds), "grid" if levels else "ints", levels or 1),
    )
    return draw(sized(model))


@st.composite
def sized(
    draw: Draw, model: ModelConfig, *, dynamic: bool | None = None, rows: int = 1
) -> ModelConfig:
    """Draw the sizes of a model's inputs, and which of them are dynamic.

    The length of a joint sequence is fixed: `torch.export` cannot show that adding the text's
    length to a symbol leaves the order of strides as it is.
    """
    names = ("batch",) if model.family == "mmdit" else tuple(SIZES)
    choices = st.sets(st.sampled_from(names), min_size=1 if dynamic else 0)
    chosen = draw(choices) if dynamic is not False else set()
    batch, seq = draw(st.integers(rows, 3)), draw(st.integers(1, 5))
    return replace(
        model,
        batch=SIZES["batch"] if "batch" in chosen else batch,
        seq=SIZES["seq"] if "seq" in chosen else seq,
        dynamic=tuple(name for name in SIZES if name in chosen),
    )


@st.composite
def weights(draw: Draw) -> c.WeightSpec:
    """Draw how weights are made."""
    return c.WeightSpec(seed=draw(seeds), kind=draw(st.sampled_from(c.WEIGHTS)))


@st.composite
def inputs(
    draw: Draw, *, kinds: Sequence[str] = c.INPUTS, layouts: Sequence[str] = c.LAYOUTS
) -> InputSpec:
    """Draw how inputs are made."""
    return InputSpec(
        seed=draw(seeds),
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(layouts)),
        padding=draw(st.sampled_from(c.PADDINGS)),
    )


def _fitting(block: BlockConfig, modulated: bool) -> BlockConfig:
    """Return a block without what its family has no place for."""
    if modulated:
        block = replace(block, place="pre", parallel=False, transposed=False)
    if block.parallel:
        block = replace(block, place="pre")
    return block
