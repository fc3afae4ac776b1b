"""Diffusion models of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .real_models import Expected, RealModel, numbers

STEPS = torch.tensor([1, 2])
TIMES = torch.tensor([1.0, 2.0])
LATENT, VIDEO = numbers(2, 4, 8, 8), numbers(2, 4, 2, 8, 8)
TEXT, POOLED = numbers(2, 5, 12), numbers(2, 10)
KEPT = torch.ones(2, 5, dtype=torch.bool)
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4}
IMAGE = SIZES | {"out_channels": 4, "num_layers": 3, "sample_size": 8}
WIDE = {"heads": 2, "head_dim": 16}
GELU = {"activation": "gelu_tanh"}
JOINT = {"source": "joint"}
TURNED = {"pairing": "interleaved", "qk_norm": True}


def diffusion(
    model: str, options: Mapping[str, Any], inputs: Mapping[str, Any], **expected: Any
) -> RealModel:
    """Return a row for a model of diffusers; keywords are fields of it or of what is expected."""
    more = {key: expected.pop(key) for key in ("gaps", "note") if key in expected}
    return RealModel(
        library="diffusers", model=model, options=options, **more,
        inputs={**inputs, "return_dict": False}, expected=Expected(**{**WIDE, **GELU, **expected}),
    )  # fmt: skip


DIFFUSION: dict[str, RealModel] = {
    "dit": diffusion(
        "DiTTransformer2DModel", {**IMAGE, "norm_num_groups": 4},
        {"hidden_states": LATENT, "timestep": STEPS, "class_labels": STEPS}),
    "pixart": diffusion(
        "PixArtTransformer2DModel",
        {**IMAGE, "out_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 32,
         "caption_channels": 12, "use_additional_conditions": False},
        {"hidden_states": LATENT, "timestep": STEPS, "encoder_hidden_states": TEXT},
        attentions=2, norm_place="mixed"),
    "sd3": diffusion(
        "SD3Transformer2DModel",
        {**IMAGE, "num_layers": 4, "joint_attention_dim": 12, "caption_projection_dim": 32,
         "pooled_projection_dim": 10, "pos_embed_max_size": 8},
        {"hidden_states": LATENT, "timestep": TIMES, "encoder_hidden_states": TEXT,
         "pooled_projections": POOLED},
        blocks=(4,), networks=7 / 4, **JOINT),
    "flux": diffusion(
        "FluxTransformer2DModel",
        {**SIZES, "patch_size": 1, "num_layers": 3, "num_single_layers": 3,
         "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (4, 4, 8)},
        {"hidden_states": numbers(2, 6, 4), "encoder_hidden_states": TEXT, "timestep": TIMES,
         "pooled_projections": POOLED, "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3)},
        blocks=(3, 3), networks=1.5, **JOINT, **TURNED),
    "wan": diffusion(
        "WanTransformer3DModel",
        {**SIZES, "out_channels": 4, "patch_size": (1, 2, 2), "text_dim": 12, "freq_dim": 16,
         "ffn_dim": 24, "num_layers": 3, "cross_attn_norm": True, "rope_max_seq_len": 32},
        {"hidden_states": VIDEO, "timestep": STEPS, "encoder_hidden_states": TEXT},
        attentions=2, **TURNED),
    "qwen_image": diffusion(
        "QwenImageTransformer2DModel",
        {**SIZES, "in_channels": 16, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 12,
         "axes_dims_rope": (4, 4, 8)},
        {"hidden_states": numbers(2, 16, 16), "timestep": TIMES, "encoder_hidden_states": TEXT,
         "encoder_hidden_states_mask": KEPT.long(), "img_shapes": [(1, 4, 4)] * 2},
        networks=5 / 3, mask="padding", **JOINT, **TURNED),
    "hunyuan_video": diffusion(
        "HunyuanVideoTransformer3DModel",
        {**SIZES, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
         "num_refiner_layers": 2, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 12,
         "pooled_projection_dim": 10, "rope_axes_dim": (4, 4, 8)},
        {"hidden_states": VIDEO, "timestep": STEPS, "encoder_hidden_states": TEXT,
         "encoder_attention_mask": KEPT, "pooled_projections": POOLED, "guidance": TIMES},
        blocks=(2, 2, 2), networks=8 / 6, mask="padding", activation="silu",
        gaps={"mask": "input"}, note="the refiner masks queries as well as keys"),
    "aura_flow": diffusion(
        "AuraFlowTransformer2DModel",
        {**SIZES, "out_channels": 4, "sample_size": 8, "num_mmdit_layers": 2,
         "num_single_dit_layers": 3, "joint_attention_dim": 12,
         "caption_projection_dim": 32, "pos_embed_max_size": 16},
        {"hidden_states": LATENT, "timestep": TIMES, "encoder_hidden_states": TEXT},
        blocks=(2, 3), networks=7 / 5, **JOINT, qk_norm=True, activation="silu", gated=True),
    "sana": diffusion(
        "SanaTransformer2DModel",
        {**SIZES, "out_channels": 4, "num_layers": 3, "num_cross_attention_heads": 2,
         "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 12,
         "sample_size": 8},
        {"hidden_states": LATENT, "timestep": STEPS, "encoder_hidden_states": TEXT},
        branches=2, networks=0, source="cross", norm_place="mixed", inside=(0.83, 0.70),
        note="linear attention: the branch is found, what it does is not understood"),
    "cogvideox": diffusion(
        "CogVideoXTransformer3DModel",
        {**SIZES, "out_channels": 4, "time_embed_dim": 16, "text_embed_dim": 12, "num_layers": 3,
         "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 5},
        {"hidden_states": numbers(2, 2, 4, 8, 8), "timestep": STEPS, "encoder_hidden_states": TEXT},
        qk_norm=True, networks=1, gaps={"blocks": (3, 3), "attentions": 6, "networks": 1,
                                        "branches": 4, "activation": None, "gated": None},
        note="two streams through one attention and one network: read as two blocks"),
    "unet": diffusion(
        "UNet2DConditionModel",
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64),
         "layers_per_block": 1, "cross_attention_dim": 12, "attention_head_dim": 2,
         "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        {"sample": LATENT, "timestep": STEPS, "encoder_hidden_states": TEXT},
        blocks=(1,) * 12, attentions=8 / 12, networks=4 / 12, branches=8 / 12, activation="gelu",
        gated=True, inside=(0.49, 0.45),
        gaps={"blocks": (1,) * 5, "branches": 5, "norm_place": "mixed"},
        note="residual blocks of convolutions that change their width"),
}  # fmt: skip
