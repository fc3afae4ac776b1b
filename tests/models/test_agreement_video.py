"""PixArt, Wan and Qwen-Image compute what diffusers computes, given its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from blockwright.models import pixart, qwen_image, wan

# Our name, a pattern, and after it theirs; several of theirs are stacked.
Names = Sequence[tuple[str, ...]]
Draw = Callable[[nn.Module], nn.Module]
Copy = Callable[[Mapping[str, Tensor], nn.Module, Names], None]
Agree = Callable[[Tensor, Tensor], None]
NUMBER, LAYER = r"blocks\.(\d+)\.", r"transformer_blocks.\1."


@torch.no_grad()
@pytest.mark.parametrize("sized", [True, False], ids=["1024", "512"])
def test_pixart(sized: bool, draw_weights: Draw, copy_weights: Copy, assert_agree: Agree) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = replace(pixart.TOY, dim=48, ffn_dim=192, spacing=1 / 2, sized=sized)
    theirs = draw_weights(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=config.heads, attention_head_dim=config.dim // config.heads,
            in_channels=config.channels, out_channels=2 * config.channels,
            num_layers=config.depth, cross_attention_dim=config.dim, sample_size=config.latent,
            patch_size=config.patch, interpolation_scale=2, use_additional_conditions=sized,
            caption_channels=config.text_dim,
        )
    )  # fmt: skip
    ours, embed = pixart.PixArt(config), "adaln_single.emb."
    copy_weights(dict(theirs.named_parameters()), ours, [
        (r"patchify\.(\w+)", r"pos_embed.proj.\1"),
        (r"time\.0\.(\w+)", embed + r"timestep_embedder.linear_1.\1"),
        (r"time\.2\.(\w+)", embed + r"timestep_embedder.linear_2.\1"),
        (r"resolution\.0\.(\w+)", embed + r"resolution_embedder.linear_1.\1"),
        (r"resolution\.2\.(\w+)", embed + r"resolution_embedder.linear_2.\1"),
        (r"aspect\.0\.(\w+)", embed + r"aspect_ratio_embedder.linear_1.\1"),
        (r"aspect\.2\.(\w+)", embed + r"aspect_ratio_embedder.linear_2.\1"),
        (r"modulation\.(\w+)", r"adaln_single.linear.\1"),
        (r"text_up\.(\w+)", r"caption_projection.linear_1.\1"),
        (r"text_down\.(\w+)", r"caption_projection.linear_2.\1"),
        (r"table", "scale_shift_table"),
        (r"head\.(\w+)", r"proj_out.\1"),
        (NUMBER + "table", LAYER + "scale_shift_table"),
        (NUMBER + r"attention\.qkv\.(\w+)", *(LAYER + rf"attn1.to_{x}.\2" for x in "qkv")),
        (NUMBER + r"attention\.out\.(\w+)", LAYER + r"attn1.to_out.0.\2"),
        (NUMBER + r"cross_attention\.query\.(\w+)", LAYER + r"attn2.to_q.\2"),
        (NUMBER + r"cross_attention\.key_value\.(\w+)",
         *(LAYER + rf"attn2.to_{x}.\2" for x in "kv")),
        (NUMBER + r"cross_attention\.out\.(\w+)", LAYER + r"attn2.to_out.0.\2"),
        (NUMBER + r"up\.(\w+)", LAYER + r"ff.net.0.proj.\2"),
        (NUMBER + r"down\.(\w+)", LAYER + r"ff.net.2.\2"),
    ])  # fmt: skip
    x, text, mask, time, *size = ours.example_inputs()
    assert not mask.all()
    expected = theirs(
        x, text, time, encoder_attention_mask=mask,
        added_cond_kwargs=dict(zip(("resolution", "aspect_ratio"), size, strict=True))
        if sized else None,
    )  # fmt: skip
    assert_agree(ours(x, text, mask, time, *size), expected.sample)


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [8, 16, 20])
def test_wan(head_dim: int, draw_weights: Draw, copy_weights: Copy, assert_agree: Agree) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = replace(wan.TOY, dim=2 * head_dim)
    theirs = draw_weights(
        diffusers.WanTransformer3DModel(
            patch_size=config.patch, num_attention_heads=config.heads,
            attention_head_dim=head_dim, in_channels=config.channels,
            out_channels=config.channels, text_dim=config.text_dim, ffn_dim=config.ffn_dim,
            num_layers=config.depth,
        )
    )  # fmt: skip
    ours, embed, layer = wan.Wan(config), "condition_embedder.", r"blocks.\1."
    parts = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0",
             "query_norm": "norm_q", "key_norm": "norm_k"}  # fmt: skip
    copy_weights(dict(theirs.named_parameters()), ours, [
        (r"patchify\.(\w+)", r"patch_embedding.\1"),
        (r"text_up\.(\w+)", embed + r"text_embedder.linear_1.\1"),
        (r"text_down\.(\w+)", embed + r"text_embedder.linear_2.\1"),
        (r"time\.0\.(\w+)", embed + r"time_embedder.linear_1.\1"),
        (r"time\.2\.(\w+)", embed + r"time_embedder.linear_2.\1"),
        (r"modulation\.(\w+)", embed + r"time_proj.\1"),
        (r"table", "scale_shift_table"),
        (r"head\.(\w+)", r"proj_out.\1"),
        (NUMBER + "table", layer + "scale_shift_table"),
        *((NUMBER + rf"attention\.{a}\.(\w+)", layer + rf"attn1.{b}.\2") for a, b in parts.items()),
        *((NUMBER + rf"cross_attention\.{a}\.(\w+)", layer + rf"attn2.{b}.\2")
          for a, b in parts.items()),
        (NUMBER + r"cross_norm\.(\w+)", layer + r"norm2.\2"),
        (NUMBER + r"up\.(\w+)", layer + r"ffn.net.0.proj.\2"),
        (NUMBER + r"down\.(\w+)", layer + r"ffn.net.2.\2"),
    ])  # fmt: skip
    x, text, time = ours.example_inputs()
    assert_agree(ours(x, text, time), theirs(x, time, text).sample)


@torch.no_grad()
@pytest.mark.parametrize("size", [(6, 8), (10, 6)])
def test_qwen_image(
    size: tuple[int, int], draw_weights: Draw, copy_weights: Copy, assert_agree: Agree
) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = replace(qwen_image.TOY, ffn_dim=64, theta=1e4)
    theirs = draw_weights(
        diffusers.QwenImageTransformer2DModel(
            patch_size=config.patch, in_channels=4 * config.channels,
            out_channels=config.channels, num_layers=config.depth,
            attention_head_dim=config.dim // config.heads, num_attention_heads=config.heads,
            joint_attention_dim=config.text_dim, axes_dims_rope=config.axes,
        )
    )  # fmt: skip
    source = dict(theirs.named_parameters())
    for part in ("weight", "bias"):  # theirs is (scale, shift)
        first, second = source[f"norm_out.linear.{part}"].chunk(2)
        source[f"norm_out.linear.{part}"] = torch.cat((second, first))
    ours = qwen_image.QwenImage(config)
    copy_weights(source, ours, [
        (r"image_in\.(\w+)", r"img_in.\1"),
        (r"text_norm\.weight", "txt_norm.weight"),
        (r"text_in\.(\w+)", r"txt_in.\1"),
        (r"time\.0\.(\w+)", r"time_text_embed.timestep_embedder.linear_1.\1"),
        (r"time\.2\.(\w+)", r"time_text_embed.timestep_embedder.linear_2.\1"),
        (r"modulation\.(\w+)", r"norm_out.linear.\1"),
        (r"head\.(\w+)", r"proj_out.\1"),
        *stream_names("image", "img", "to_{}", "to_out.0", "norm_{}"),
        *stream_names("text", "txt", "add_{}_proj", "to_add_out", "norm_added_{}"),
    ])  # fmt: skip
    height, width = size
    x, text, mask, time = ours.example_inputs(height=height, width=width)
    assert not mask.all()
    rows, columns = height // 2, width // 2
    packed = (
        x.reshape(2, -1, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    )
    expected = theirs(packed, text, mask, time, [(1, rows, columns)] * 2).sample
    expected = expected.reshape(2, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    assert_agree(ours(x, text, mask, time), expected.reshape(x.shape))


def stream_names(ours: str, theirs: str, projection: str, out: str, norm: str) -> Names:
    """Names of one stream of a joint block."""
    head = NUMBER + rf"{ours}\."
    letters = {"query": "q", "key": "k", "value": "v"}
    return [
        (head + r"modulation\.(\w+)", LAYER + rf"{theirs}_mod.1.\2"),
        *((head + rf"{name}\.(\w+)", LAYER + f"attn.{projection.format(x)}." + r"\2")
          for name, x in letters.items()),
        *((head + rf"{name}_norm\.(\w+)", LAYER + f"attn.{norm.format(x)}." + r"\2")
          for name, x in list(letters.items())[:2]),
        (head + r"out\.(\w+)", LAYER + rf"attn.{out}.\2"),
        (head + r"up\.(\w+)", LAYER + rf"{theirs}_mlp.net.0.proj.\2"),
        (head + r"down\.(\w+)", LAYER + rf"{theirs}_mlp.net.2.\2"),
    ]  # fmt: skip
