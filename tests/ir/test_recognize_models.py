"""Recognition of attention in published models, at tiny sizes with random weights."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.recognize import Attention
from blockwright.passes import Canonicalize

IDS = torch.arange(12).reshape(2, 6) % 32
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LLM = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
WINDOW = {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 3}
QUARTER = {"partial_rotary_factor": 0.5}
PLAIN = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 4}


def row(mask: str = "causal", **other: Any) -> dict[str, Any]:
    """Return what the first attention of a model must be recognised as."""
    usual = {
        "heads": 4, "kv_heads": 4, "head_dim": 4, "scale": 0.5, "mask": mask, "window": None,
        "softcap": None, "source": "self", "qk_norm": False, "pairing": None, "dims": None,
        "biases": (False,) * 4,
    }  # fmt: skip
    return usual | other


HALF = {"pairing": "half", "dims": 4}
PARTIAL = {"pairing": "half", "dims": 2}
BIASED = {"biases": (True,) * 4}
GROUPED = {"kv_heads": 2}
# configuration, implementations of attention there are, and what the first attention is
LANGUAGE: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "Llama": (LLM | {"num_key_value_heads": 2}, "both",
              row(**HALF, **GROUPED)),
    "Qwen3": (LLM | {"num_key_value_heads": 2, "head_dim": 6}, "both",
              row(head_dim=6, scale=6**-0.5, qk_norm=True, pairing="half", dims=6, **GROUPED)),
    "Mistral": (LLM | WINDOW, "both", row("window", window=3, **HALF, **GROUPED)),
    "Gemma2": (LLM | WINDOW | {"query_pre_attn_scalar": 16}, "eager",
               row("window", window=3, softcap=50.0, scale=0.25, **HALF, **GROUPED)),
    "Gemma3Text": (LLM | WINDOW | {"query_pre_attn_scalar": 16}, "both",
               row("window", window=3, scale=0.25, qk_norm=True, **HALF, **GROUPED)),
    "GPTNeoX": (LLM | {"rotary_pct": 0.5}, "both", row(**PARTIAL, **BIASED)),
    "Phi": (LLM | QUARTER, "both", row(**PARTIAL, **BIASED)),
    "StableLm": (LLM | QUARTER | {"num_key_value_heads": 2}, "both", row(**PARTIAL, **GROUPED)),
    "Glm": (LLM | QUARTER | {"num_key_value_heads": 2, "head_dim": 4}, "both",
            row(pairing="interleaved", dims=2, biases=(True, True, True, False), **GROUPED)),
    "Cohere": (LLM | {"num_key_value_heads": 2}, "both",
               row(pairing="interleaved", dims=4, **GROUPED)),
    "OPT": (PLAIN | {"num_hidden_layers": 2, "ffn_dim": 24, "word_embed_proj_dim": 16}, "both",
            row(**BIASED)),
    "Bloom": ({"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 4}, "eager",
              row("causal+bias", **BIASED)),
    "Mpt": ({"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
            "eager", row("causal+bias")),
    "Bert": (LLM, "both", row("none", **BIASED)),
    "CLIPText": (LLM | {"projection_dim": 8}, "both", row(**BIASED)),
    "ViT": (VISION, "both", row("none", **BIASED)),
    "Swin": ({"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [2], "num_heads": [2],
              "window_size": 2}, "both", row("bias", heads=2, kv_heads=2, **BIASED)),
    "T5Encoder": ({"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2,
                   "num_heads": 4}, "eager", row("bias", scale=1.0)),
    "CLIPVision": (VISION | {"projection_dim": 8}, "both", row("none", **BIASED)),
}  # fmt: skip
CANONICAL: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "GPT2": ({"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4},
             "both", row(**BIASED)),
    "Falcon": (PLAIN | {"num_hidden_layers": 2, "alibi": True, "multi_query": False,
                        "parallel_attn": False, "bias": True},
               "sdpa", row("input", **BIASED)),
    "Falcon of several heads per key": (PLAIN | {"num_hidden_layers": 2}, "both",
                                        row(kv_heads=1, **HALF)),
}  # fmt: skip


def language(name: str, attention: str) -> Program:
    hf = pytest.importorskip("transformers")
    options, supported, _ = (LANGUAGE | CANONICAL)[name]
    if supported not in ("both", attention):
        pytest.skip(f"{name} has no such implementation")
    torch.manual_seed(0)
    family = name.split()[0]
    config = getattr(hf, f"{family.removesuffix('Encoder')}Config")(**options)
    model = getattr(hf, f"{family}Model")._from_config(config, attn_implementation=attention)
    for table in model.parameters():  # a bias of zeros masks nothing
        if not table.any():
            nn.init.normal_(table)
    return capture(model.eval(), (PIXELS if name in ("ViT", "CLIPVision", "Swin") else IDS,))


def found(attention: Attention) -> dict[str, Any]:
    constants = attention.constants()
    rotary = constants.pop("rotary")
    return constants | {
        "window": attention.window,
        "softcap": attention.softcap,
        "pairing": rotary["pairing"],
        "dims": rotary["dims"],
        "biases": tuple(layer.bias is not None for layer in attention.layers),
    }


def like(expected: dict[str, Any]) -> dict[str, Any]:
    return expected | {"scale": pytest.approx(expected["scale"])}


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers(name: str, attention: str) -> None:
    program = language(name, attention)
    assert found(program.attentions()[0]) == like(LANGUAGE[name][2])
    assert all(layer.is_dense for region in program.attentions() for layer in region.layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", CANONICAL)
def test_transformers_after_canonicalizing(name: str) -> None:
    program = language(name, "sdpa")
    passes = [Canonicalize(), Canonicalize(allow_no_match=True)]
    program, _ = run_passes(program, passes)
    assert found(program.attentions()[0]) == like(CANONICAL[name][2])


def test_heads_that_take_turns_have_their_rows() -> None:
    """GPT-NeoX lays out query, key and value head by head."""
    program = language("GPTNeoX", "sdpa")
    attention = program.attentions()[0]
    query, key, value, _ = attention.layers
    whole = program.weight(str(query.weight_node.target), attention.instance)  # type: ignore[union-attr]
    parts = whole.unflatten(0, (4, 3, 4))  # [heads, roles, head_dim, dim]
    for index, layer in enumerate((query, key, value)):
        torch.testing.assert_close(layer.weight, parts[:, index].flatten(0, 1), rtol=0, atol=0)


def diffusion(name: str) -> tuple[nn.Module, dict[str, Any]]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    steps = torch.tensor([1, 2])
    heads = {"num_attention_heads": 2, "num_layers": 2}
    joint = heads | {"joint_attention_dim": 6}
    text, latent = torch.zeros(2, 5, 6), torch.zeros(2, 4, 8, 8)
    inputs: dict[str, Any] = {"encoder_hidden_states": text, "timestep": steps}
    options: dict[str, Any]
    if name == "SD3Transformer2DModel":
        options = joint | {
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "attention_head_dim": 8,
            "caption_projection_dim": 16, "pooled_projection_dim": 5, "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
        }  # fmt: skip
        inputs |= {"hidden_states": latent, "pooled_projections": torch.zeros(2, 5)}
    elif name == "FluxTransformer2DModel":
        options = joint | {
            "in_channels": 4, "num_single_layers": 1, "attention_head_dim": 8,
            "pooled_projection_dim": 5, "axes_dims_rope": (2, 2, 4), "num_layers": 1,
        }  # fmt: skip
        inputs |= {
            "hidden_states": torch.zeros(2, 6, 4), "pooled_projections": torch.zeros(2, 5),
            "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3), "timestep": steps.float(),
        }  # fmt: skip
    elif name == "QwenImageTransformer2DModel":
        options = joint | {
            "in_channels": 16, "out_channels": 4, "attention_head_dim": 8,
            "axes_dims_rope": (2, 2, 4),
        }  # fmt: skip
        inputs |= {
            "hidden_states": torch.zeros(2, 16, 16), "timestep": steps.float(),
            "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.long),
            "img_shapes": [(1, 4, 4)] * 2,
        }  # fmt: skip
    elif name == "WanTransformer3DModel":
        options = heads | {
            "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 6,
            "freq_dim": 8, "ffn_dim": 16, "rope_max_seq_len": 32, "num_layers": 1,
        }  # fmt: skip
        inputs |= {"hidden_states": torch.zeros(2, 4, 2, 4, 4)}
    else:
        assert name == "PixArtTransformer2DModel"
        options = heads | {
            "attention_head_dim": 8, "in_channels": 4, "sample_size": 8, "norm_num_groups": 4,
            "cross_attention_dim": 16, "caption_channels": 6, "use_additional_conditions": False,
        }  # fmt: skip
        sizes = {"resolution": None, "aspect_ratio": None}
        masks = {"encoder_attention_mask": torch.ones(2, 5), "added_cond_kwargs": sizes}
        inputs |= {"hidden_states": latent} | masks
    model = getattr(diffusers, name)(**options).eval()
    known = inspect.signature(model.forward).parameters
    return model, {k: v for k, v in inputs.items() if k in known} | {"return_dict": False}


TURNED = {"pairing": "interleaved", "qk_norm": True}
DIFFUSION: dict[str, list[dict[str, Any]]] = {
    "PixArtTransformer2DModel": [
        {"source": "self", "mask": "none", "streams": 1},
        {"source": "cross", "mask": "padding", "streams": 1},
    ],
    "SD3Transformer2DModel": [{"source": "joint", "mask": "none", "streams": 2, "qk_norm": True}],
    "FluxTransformer2DModel": [
        TURNED | {"source": "joint", "streams": 2, "dims": 8, "columns": (None, None)},
        TURNED | {"source": "self", "streams": 1, "dims": 8, "columns": ((0, 16),)},
    ],
    "QwenImageTransformer2DModel": [TURNED | {"source": "joint", "streams": 2, "dims": 8}],
    "WanTransformer3DModel": [
        TURNED | {"source": "self", "streams": 1, "dims": 12},
        {"source": "cross", "streams": 1, "qk_norm": True, "dims": None},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusers(name: str) -> None:
    model, inputs = diffusion(name)
    attentions = capture(model, inputs).attentions()
    for attention, expected in zip(attentions, DIFFUSION[name], strict=False):
        outputs = [s.output.columns for s in attention.streams if s.output]
        have = found(attention) | {"streams": len(attention.streams), "columns": tuple(outputs)}
        assert {name: have[name] for name in expected} == expected
        assert all(isinstance(layer.weight, Tensor) for layer in attention.layers)
        assert len(attention.outputs) >= len(outputs)
