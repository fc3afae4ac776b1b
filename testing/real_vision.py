"""Vision models of transformers."""

from __future__ import annotations

from typing import Any

from .real_models import Expected, RealModel, numbers

VISION = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
SWIN = {"image_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
STAGES = {
    "depths": [2, 2], "hidden_sizes": [8, 16], "num_encoder_blocks": 2, "patch_sizes": [7, 3],
    "strides": [4, 2],
}  # fmt: skip
SEGFORMER = STAGES | {
    "sr_ratios": [4, 1], "num_attention_heads": [2, 4], "decoder_hidden_size": 16,
    "mlp_ratios": [4, 4],
}  # fmt: skip
PVT = {
    "image_size": 32, "depths": [2, 2], "hidden_sizes": [8, 16], "num_encoder_blocks": 2,
    "patch_sizes": [4, 2], "strides": [4, 2], "sequence_reduction_ratios": [4, 1],
    "num_attention_heads": [2, 4], "mlp_ratios": [4, 4],
}  # fmt: skip
CONVNEXT = {"num_stages": 2, "depths": [2, 2], "hidden_sizes": [8, 16]}


def vision(
    name: str, options: dict[str, Any], kind: str = "ForImageClassification", **expected: Any
) -> RealModel:
    """Return a row for a model of one image; keywords are fields of it or of what is expected."""
    more = {key: expected.pop(key) for key in ("gaps", "note") if key in expected}
    return RealModel(
        model=f"{name}{kind}", config=f"{name}Config", options=options, **more,
        inputs={"pixel_values": numbers(2, 3, 32, 32)}, expected=Expected(**expected),
    )  # fmt: skip


VISION_MODELS: dict[str, RealModel] = {
    "vit": vision("ViT", VISION),
    "deit": vision("DeiT", VISION),
    "dinov2": vision("Dinov2", VISION),
    "beit": vision("Beit", VISION | {"use_relative_position_bias": True}, mask="bias"),
    "siglip": vision("SiglipVision", VISION, "Model", activation="gelu_tanh", blocks=(3, 1),
                     attentions=0.75),
    "clip_vision": vision("CLIPVision", VISION | {"projection_dim": 8}, "Model",
                          activation="quick_gelu"),
    "swin": vision("Swin", SWIN, blocks=(2, 2), heads=2, mask="bias"),
    "segformer": vision("Segformer", SEGFORMER, blocks=(2, 2), heads=2),
    "pvt": vision("Pvt", PVT, blocks=(2, 2), heads=2),
    "convnext": vision("ConvNext", CONVNEXT, blocks=(2, 2), attentions=0, networks=0, branches=1,
                       norm_place="none"),
    "poolformer": vision("PoolFormer", STAGES | {"padding": [2, 1]}, blocks=(2, 2), attentions=0,
                         branches=1),
}  # fmt: skip
