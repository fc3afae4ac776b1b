"""The zoo computes what transformers and diffusers compute, given their weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright.models import bert, dit, flux, gpt, llama, sd3, swin, vit

# Our name, a pattern, and after it theirs; several of theirs are stacked.
Names = Sequence[tuple[str, ...]]
Draw = Callable[[nn.Module], nn.Module]
Copy = Callable[[Mapping[str, Tensor], nn.Module, Names], None]
Agree = Callable[[Tensor, Tensor], None]


def swap_halves(weights: dict[str, Tensor], *names: str) -> None:
    """Turn (scale, shift) into (shift, scale)."""
    for name in names:
        for part in ("weight", "bias"):
            first, second = weights[f"{name}.{part}"].chunk(2)
            weights[f"{name}.{part}"] = torch.cat((second, first))


@torch.no_grad()
def test_gpt2(draw_weights: Draw, copy_weights: Copy, assert_agree: Agree) -> None:
    transformers = pytest.importorskip("transformers")
    config = gpt.TOY
    theirs = draw_weights(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab, n_positions=config.context, n_embd=config.dim,
                n_head=config.heads, n_layer=config.depth, n_inner=config.ffn_dim,
            )
        )
    )  # fmt: skip
    source: dict[str, Tensor] = {}
    for name, stored in theirs.named_parameters():
        value = stored.T if re.search(r"c_\w+\.weight", name) else stored
        if "c_attn" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                source[name.replace("c_attn", letter)] = part
        else:
            source[name] = value
    ours = gpt.GPT(config)
    block = r"blocks\.(\d+)\."
    copy_weights(source, ours, [
        (r"tokens\.weight", "transformer.wte.weight"),
        (r"positions\.weight", "transformer.wpe.weight"),
        (r"norm\.(\w+)", r"transformer.ln_f.\1"),
        (block + r"attention_norm\.(\w+)", r"transformer.h.\1.ln_1.\2"),
        (block + r"ffn_norm\.(\w+)", r"transformer.h.\1.ln_2.\2"),
        (block + r"attention\.([qkv])[a-z]+\.(\w+)", r"transformer.h.\1.attn.\2.\3"),
        (block + r"attention\.out\.(\w+)", r"transformer.h.\1.attn.c_proj.\2"),
        (block + r"up\.(\w+)", r"transformer.h.\1.mlp.c_fc.\2"),
        (block + r"down\.(\w+)", r"transformer.h.\1.mlp.c_proj.\2"),
    ])  # fmt: skip
    (tokens,) = ours.example_inputs()
    assert_agree(ours(tokens), theirs(tokens).logits)


SMALL = llama.LlamaConfig(
    vocab=32, dim=16, heads=4, kv_heads=2, head_dim=8, depth=2, ffn_dim=24, theta=100.0
)
STRETCH = llama.Stretch(context=32)  # one rotation of SMALL is fast, one in between, two slow


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Llama", SMALL),
        ("Llama", replace(SMALL, stretch=STRETCH)),
        ("Qwen3", replace(SMALL, qk_norm=True, norm_eps=1e-6)),
        ("Qwen3", replace(SMALL, qk_norm=True, tied=True)),
    ],
    ids=["llama-2", "llama-3.1", "qwen3-8b", "qwen3-0.6b"],
)
def test_llama(
    kind: str,
    config: llama.LlamaConfig,
    draw_weights: Draw,
    copy_weights: Copy,
    assert_agree: Agree,
) -> None:
    transformers = pytest.importorskip("transformers")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.theta}
    if config.stretch is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.stretch.factor,
            "low_freq_factor": config.stretch.slow,
            "high_freq_factor": config.stretch.fast,
            "original_max_position_embeddings": config.stretch.context,
        }
    build = getattr(transformers, f"{kind}ForCausalLM")
    theirs = draw_weights(
        build(
            getattr(transformers, f"{kind}Config")(
                vocab_size=config.vocab, hidden_size=config.dim, head_dim=config.head_dim,
                num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
                num_hidden_layers=config.depth, intermediate_size=config.ffn_dim,
                max_position_embeddings=64, rms_norm_eps=config.norm_eps,
                tie_word_embeddings=config.tied, rope_parameters=rope,
            )
        )
    )  # fmt: skip
    ours, block = llama.Llama(config), r"blocks\.(\d+)\."
    copy_weights(dict(theirs.named_parameters()), ours, [
        (r"tokens\.weight", "model.embed_tokens.weight"),
        (r"norm\.weight", "model.norm.weight"),
        (r"head\.weight", "lm_head.weight"),
        (block + r"attention_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
        (block + r"ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
        (block + r"attention\.([qk])\w+_norm\.weight", r"model.layers.\1.self_attn.\2_norm.weight"),
        (block + r"attention\.(\w)\w+\.weight", r"model.layers.\1.self_attn.\2_proj.weight"),
        (block + r"(\w+)\.weight", r"model.layers.\1.mlp.\2_proj.weight"),
    ])  # fmt: skip
    tokens = torch.randint(0, config.vocab, (2, 40), generator=torch.Generator().manual_seed(1))
    assert_agree(ours(tokens), theirs(tokens).logits)


@torch.no_grad()
def test_bert(draw_weights: Draw, copy_weights: Copy, assert_agree: Agree) -> None:
    transformers = pytest.importorskip("transformers")
    config = bert.TOY
    theirs = draw_weights(
        transformers.BertModel(
            transformers.BertConfig(
                vocab_size=config.vocab, max_position_embeddings=config.context,
                type_vocab_size=config.types, hidden_size=config.dim,
                num_attention_heads=config.heads, num_hidden_layers=config.depth,
                intermediate_size=config.ffn_dim,
            )
        )
    )  # fmt: skip
    ours, block = bert.Bert(config), r"blocks\.(\d+)\."
    copy_weights(dict(theirs.named_parameters()), ours, [
        (r"tokens\.weight", "embeddings.word_embeddings.weight"),
        (r"positions\.weight", "embeddings.position_embeddings.weight"),
        (r"types\.weight", "embeddings.token_type_embeddings.weight"),
        (r"norm\.(\w+)", r"embeddings.LayerNorm.\1"),
        (r"pooler\.(\w+)", r"pooler.dense.\1"),
        (block + r"attention_norm\.(\w+)", r"encoder.layer.\1.attention.output.LayerNorm.\2"),
        (block + r"attention\.out\.(\w+)", r"encoder.layer.\1.attention.output.dense.\2"),
        (block + r"attention\.(\w+)\.(\w+)", r"encoder.layer.\1.attention.self.\2.\3"),
        (block + r"up\.(\w+)", r"encoder.layer.\1.intermediate.dense.\2"),
        (block + r"down\.(\w+)", r"encoder.layer.\1.output.dense.\2"),
        (block + r"ffn_norm\.(\w+)", r"encoder.layer.\1.output.LayerNorm.\2"),
    ])  # fmt: skip
    tokens, types, mask = ours.example_inputs()
    features, pooled = ours(tokens, types, mask)
    expected = theirs(tokens, token_type_ids=types, attention_mask=mask.long())
    assert_agree(features[mask], expected.last_hidden_state[mask])
    assert_agree(pooled, expected.pooler_output)


@torch.no_grad()
def test_vit(draw_weights: Draw, copy_weights: Copy, assert_agree: Agree) -> None:
    transformers = pytest.importorskip("transformers")
    config = vit.TOY
    theirs = draw_weights(
        transformers.ViTForImageClassification(
            transformers.ViTConfig(
                image_size=config.image, patch_size=config.patch, num_labels=config.classes,
                hidden_size=config.dim, num_attention_heads=config.heads,
                num_hidden_layers=config.depth, intermediate_size=config.ffn_dim,
                layer_norm_eps=1e-6,
            )
        )
    )  # fmt: skip
    ours, block, layer = vit.ViT(config), r"blocks\.(\d+)\.", r"vit.layers.\1."
    copy_weights(dict(theirs.named_parameters()), ours, [
        (r"class_token", "vit.embeddings.cls_token"),
        (r"positions", "vit.embeddings.position_embeddings"),
        (r"patchify\.(\w+)", r"vit.embeddings.patch_embeddings.projection.\1"),
        (r"norm\.(\w+)", r"vit.layernorm.\1"),
        (r"head\.(\w+)", r"classifier.\1"),
        (block + r"attention_norm\.(\w+)", layer + r"layernorm_before.\2"),
        (block + r"ffn_norm\.(\w+)", layer + r"layernorm_after.\2"),
        (block + r"attention\.qkv\.(\w+)", *(layer + rf"attention.{x}_proj.\2" for x in "qkv")),
        (block + r"attention\.out\.(\w+)", layer + r"attention.o_proj.\2"),
        (block + r"up\.(\w+)", layer + r"mlp.fc1.\2"),
        (block + r"down\.(\w+)", layer + r"mlp.fc2.\2"),
    ])  # fmt: skip
    (image,) = ours.example_inputs()
    assert_agree(ours(image), theirs(image).logits)


@torch.no_grad()
def test_swin(draw_weights: Draw, copy_weights: Copy, assert_agree: Agree) -> None:
    transformers = pytest.importorskip("transformers")
    config = swin.TOY
    theirs = draw_weights(
        transformers.SwinForImageClassification(
            transformers.SwinConfig(
                image_size=config.image, patch_size=config.patch, num_labels=config.classes,
                embed_dim=config.dim, depths=config.depths, num_heads=config.heads,
                window_size=config.window, mlp_ratio=config.ffn_ratio,
            )
        )
    )  # fmt: skip
    ours = swin.Swin(config)
    block, layer = r"stages\.(\d+)\.blocks\.(\d+)\.", r"swin.encoder.layers.\1.blocks.\2."
    table = "relative_position_bias.relative_position_bias_table"
    copy_weights(dict(theirs.named_parameters()), ours, [
        (r"patchify\.(\w+)", r"swin.embeddings.patch_embeddings.projection.\1"),
        (r"patch_norm\.(\w+)", r"swin.embeddings.norm.\1"),
        (r"norm\.(\w+)", r"swin.layernorm.\1"),
        (r"head\.(\w+)", r"classifier.\1"),
        (r"stages\.(\d+)\.merge\.norm\.(\w+)", r"swin.encoder.layers.\1.downsample.norm.\2"),
        (r"stages\.(\d+)\.merge\.reduce\.(\w+)", r"swin.encoder.layers.\1.downsample.reduction.\2"),
        (block + r"attention_norm\.(\w+)", layer + r"layernorm_before.\3"),
        (block + r"ffn_norm\.(\w+)", layer + r"layernorm_after.\3"),
        (block + r"attention\.bias", layer + "attention." + table),
        (block + r"attention\.qkv\.(\w+)", *(layer + rf"attention.{x}_proj.\3" for x in "qkv")),
        (block + r"attention\.out\.(\w+)", layer + r"attention.o_proj.\3"),
        (block + r"up\.(\w+)", layer + r"mlp.fc1.\3"),
        (block + r"down\.(\w+)", layer + r"mlp.fc2.\3"),
    ])  # fmt: skip
    (image,) = ours.example_inputs()
    assert_agree(ours(image), theirs(image).logits)


@torch.no_grad()
def test_dit(draw_weights: Draw, copy_weights: Copy, assert_agree: Agree) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = dit.DiTConfig(latent=8, classes=5, dim=16, heads=2, depth=2, ffn_dim=64)
    model: Any = diffusers.DiTTransformer2DModel(
        num_attention_heads=config.heads, attention_head_dim=config.dim // config.heads,
        in_channels=config.channels, out_channels=2 * config.channels, num_layers=config.depth,
        sample_size=config.latent, patch_size=config.patch, num_embeds_ada_norm=config.classes,
        norm_eps=1e-6,
    )  # fmt: skip
    # diffusers has a copy of the embeddings in every block, and a lower last frequency in them
    # than the code released with the paper, which ours follows.
    shared = model.transformer_blocks[0].norm1.emb
    shared.time_proj.downscale_freq_shift = 0
    for block in model.transformer_blocks:
        block.norm1.emb = shared
    theirs, ours = draw_weights(model), dit.DiT(config)
    emb = "transformer_blocks.0.norm1.emb."
    number, layer = r"blocks\.(\d+)\.", r"transformer_blocks.\1."
    copy_weights(dict(theirs.named_parameters()), ours, [
        (r"patchify\.(\w+)", r"pos_embed.proj.\1"),
        (r"time\.0\.(\w+)", emb + r"timestep_embedder.linear_1.\1"),
        (r"time\.2\.(\w+)", emb + r"timestep_embedder.linear_2.\1"),
        (r"labels\.weight", emb + "class_embedder.embedding_table.weight"),
        (r"modulation\.(\w+)", r"proj_out_1.\1"),
        (r"head\.(\w+)", r"proj_out_2.\1"),
        (number + r"modulation\.(\w+)", layer + r"norm1.linear.\2"),
        (number + r"attention\.qkv\.(\w+)", *(layer + rf"attn1.to_{x}.\2" for x in "qkv")),
        (number + r"attention\.out\.(\w+)", layer + r"attn1.to_out.0.\2"),
        (number + r"up\.(\w+)", layer + r"ff.net.0.proj.\2"),
        (number + r"down\.(\w+)", layer + r"ff.net.2.\2"),
    ])  # fmt: skip
    x, time, label = ours.example_inputs()
    assert_agree(ours(x, time, label), theirs(x, timestep=time, class_labels=label).sample)


def joint_names(blocks: str, layer: str) -> Names:
    """Names in a joint block, the same in FLUX and SD3."""
    return [
        (blocks + r"image\.modulation\.(\w+)", layer + r"norm1.linear.\2"),
        (blocks + r"image\.qkv\.(\w+)", *(layer + rf"attn.to_{x}.\2" for x in "qkv")),
        (blocks + r"image\.split\.(\w)\w+_norm\.weight", layer + r"attn.norm_\2.weight"),
        (blocks + r"image\.out\.(\w+)", layer + r"attn.to_out.0.\2"),
        (blocks + r"image\.up\.(\w+)", layer + r"ff.net.0.proj.\2"),
        (blocks + r"image\.down\.(\w+)", layer + r"ff.net.2.\2"),
        (blocks + r"text\.modulation\.(\w+)", layer + r"norm1_context.linear.\2"),
        (blocks + r"text\.qkv\.(\w+)", *(layer + rf"attn.add_{x}_proj.\2" for x in "qkv")),
        (blocks + r"text\.split\.(\w)\w+_norm\.weight", layer + r"attn.norm_added_\2.weight"),
        (blocks + r"text\.out\.(\w+)", layer + r"attn.to_add_out.\2"),
        (blocks + r"text\.up\.(\w+)", layer + r"ff_context.net.0.proj.\2"),
        (blocks + r"text\.down\.(\w+)", layer + r"ff_context.net.2.\2"),
    ]


OUTER: Names = [
    (r"text_in\.(\w+)", r"context_embedder.\1"),
    (r"time\.0\.(\w+)", r"time_text_embed.timestep_embedder.linear_1.\1"),
    (r"time\.2\.(\w+)", r"time_text_embed.timestep_embedder.linear_2.\1"),
    (r"guidance\.0\.(\w+)", r"time_text_embed.guidance_embedder.linear_1.\1"),
    (r"guidance\.2\.(\w+)", r"time_text_embed.guidance_embedder.linear_2.\1"),
    (r"pooled\.0\.(\w+)", r"time_text_embed.text_embedder.linear_1.\1"),
    (r"pooled\.2\.(\w+)", r"time_text_embed.text_embedder.linear_2.\1"),
    (r"modulation\.(\w+)", r"norm_out.linear.\1"),
    (r"head\.(\w+)", r"proj_out.\1"),
]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_flux(guidance: bool, draw_weights: Draw, copy_weights: Copy, assert_agree: Agree) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = flux.FluxConfig(
        channels=4, text_dim=6, pooled_dim=5, dim=16, heads=2, double_depth=2, single_depth=2,
        ffn_dim=64, axes=(2, 2, 4), guidance=guidance,
    )  # fmt: skip
    theirs = draw_weights(
        diffusers.FluxTransformer2DModel(
            in_channels=config.channels, num_layers=config.double_depth,
            num_single_layers=config.single_depth, num_attention_heads=config.heads,
            attention_head_dim=config.dim // config.heads, joint_attention_dim=config.text_dim,
            pooled_projection_dim=config.pooled_dim, guidance_embeds=guidance,
            axes_dims_rope=config.axes,
        )
    )  # fmt: skip
    source: dict[str, Tensor] = dict(theirs.named_parameters())
    ours = flux.Flux(config)
    swap_halves(source, "norm_out.linear")
    single, layer = r"single_blocks\.(\d+)\.", r"single_transformer_blocks.\1."
    copy_weights(source, ours, [
        *OUTER,
        (r"image_in\.(\w+)", r"x_embedder.\1"),
        *joint_names(r"double_blocks\.(\d+)\.", r"transformer_blocks.\1."),
        (single + r"modulation\.(\w+)", layer + r"norm.linear.\2"),
        (
            single + r"qkv_up\.(\w+)",
            *(layer + rf"attn.to_{x}.\2" for x in "qkv"),
            layer + r"proj_mlp.\2",
        ),
        (single + r"split\.(\w)\w+_norm\.weight", layer + r"attn.norm_\2.weight"),
        (single + r"out_down\.(\w+)", layer + r"proj_out.\2"),
    ])  # fmt: skip
    image, text, pooled, time, places, *scale = ours.example_inputs()
    expected = theirs(
        image, text, pooled, time, img_ids=places, txt_ids=torch.zeros(text.shape[1], 3),
        guidance=scale[0] if scale else None,
    )  # fmt: skip
    assert_agree(ours(image, text, pooled, time, places, *scale), expected.sample)


@torch.no_grad()
def test_sd3(draw_weights: Draw, copy_weights: Copy, assert_agree: Agree) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = sd3.SD3Config(
        latent=8, channels=4, text_dim=6, pooled_dim=5, dim=16, heads=2, depth=3, ffn_dim=64,
        table=6, spacing=1 / 3,
    )  # fmt: skip
    theirs = draw_weights(
        diffusers.SD3Transformer2DModel(
            sample_size=4, patch_size=config.patch, in_channels=config.channels,
            out_channels=config.channels, num_layers=config.depth,
            num_attention_heads=config.heads, attention_head_dim=config.dim // config.heads,
            joint_attention_dim=config.text_dim, caption_projection_dim=config.dim,
            pooled_projection_dim=config.pooled_dim, pos_embed_max_size=config.table,
        )
    )  # fmt: skip
    source: dict[str, Tensor] = dict(theirs.named_parameters())
    ours = sd3.SD3(config)
    swap_halves(source, "norm_out.linear", "transformer_blocks.2.norm1_context.linear")
    copy_weights(source, ours, [
        *OUTER,
        (r"patchify\.(\w+)", r"pos_embed.proj.\1"),
        *joint_names(r"blocks\.(\d+)\.", r"transformer_blocks.\1."),
    ])  # fmt: skip
    x, text, pooled, time = ours.example_inputs()
    assert_agree(ours(x, text, pooled, time), theirs(x, text, pooled, 1000 * time).sample)
