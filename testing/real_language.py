"""Language and speech models of transformers."""

from __future__ import annotations

from typing import Any

import torch

from .real_models import Expected, RealModel, numbers, token_ids

LLM = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
GROUPED = LLM | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 16}
GPT = {"vocab_size": 32, "n_positions": 32, "n_ctx": 32, "n_embd": 16, "n_layer": 3, "n_head": 4}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 4}
PAIR = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "pad_token_id": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 32, "decoder_start_token_id": 3,
    "use_cache": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
WHISPER = PAIR | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
WAV = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 24, "conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}  # fmt: skip
IDS = {"input_ids": token_ids(), "use_cache": False}
ENCODED = {"input_ids": token_ids(), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
BOTH = {"input_ids": token_ids(), "decoder_input_ids": token_ids(4), "use_cache": False}
ROTATED = {"mask": "causal", "pairing": "half"}
SILU: dict[str, Any] = {"activation": "silu", "gated": True}
CAUSAL = {"mask": "causal"}
POST = {"norm_place": "post", "mask": "padding"}


def decoder(name: str, options: dict[str, Any], **expected: Any) -> RealModel:
    """Return a row for `<name>ForCausalLM`; keywords are fields of it or of what is expected."""
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, name.removesuffix("Text") + "ForCausalLM")
    more = {key: expected.pop(key) for key in ("gaps", "note", "canonical") if key in expected}
    return RealModel(
        model=kind, config=f"{name}Config", options=options, inputs=IDS,
        expected=Expected(**expected), **more,
    )  # fmt: skip


def encoder(name: str, options: dict[str, Any], **expected: Any) -> RealModel:
    """Return a row for `<name>Model` of token ids and a padding mask."""
    return RealModel(
        model=f"{name}Model", config=f"{name}Config", options=options, inputs=ENCODED,
        expected=Expected(**expected),
    )  # fmt: skip


LANGUAGE: dict[str, RealModel] = {
    "gpt2": decoder("GPT2", GPT | {"n_inner": 24}, **CAUSAL, activation="gelu_tanh",
                    canonical=True),
    "gptj": decoder("GPTJ", GPT | {"n_inner": 24, "rotary_dim": 2}, mask="causal",
                    pairing="interleaved", activation="gelu_tanh"),
    "llama": decoder("Llama", GROUPED, **ROTATED, **SILU, kv_heads=2),
    "mistral": decoder("Mistral", GROUPED | {"sliding_window": 4}, mask="window", pairing="half",
                       **SILU, kv_heads=2),
    "qwen2": decoder("Qwen2", GROUPED, **ROTATED, **SILU, kv_heads=2),
    "qwen3": decoder("Qwen3", GROUPED | {"head_dim": 8}, **ROTATED, **SILU, kv_heads=2, head_dim=8,
                     qk_norm=True),
    "gemma2": decoder("Gemma2", WIDE | {"attn_implementation": "eager"}, mask="window",
                      pairing="half", kv_heads=2, activation="gelu_tanh", gated=True,
                      norm_place="sandwich"),
    "gemma3": decoder("Gemma3Text", WIDE, mask="window", pairing="half", kv_heads=2, qk_norm=True,
                      activation="gelu_tanh", gated=True, norm_place="sandwich"),
    "granite": decoder("Granite", GROUPED, **ROTATED, **SILU, kv_heads=2),
    "phi": decoder("Phi", LLM | {"partial_rotary_factor": 0.5}, **ROTATED, activation="gelu_tanh"),
    "phi3": decoder("Phi3", GROUPED, **ROTATED, **SILU, kv_heads=2),
    "neox": decoder("GPTNeoX", LLM | {"rotary_pct": 0.5}, **ROTATED),
    "falcon": decoder("Falcon", LLM | {"new_decoder_architecture": False, "multi_query": True},
                      **ROTATED, kv_heads=1, canonical=True),
    "bloom": decoder("Bloom", {"vocab_size": 32, "hidden_size": 16, "n_layer": 3, "n_head": 4},
                     mask="causal+bias", activation="gelu_tanh"),
    "opt": decoder("OPT", LLM | {"ffn_dim": 24, "word_embed_proj_dim": 16}, **CAUSAL,
                   activation="relu"),
    "stablelm": decoder("StableLm", GROUPED | {"partial_rotary_factor": 0.5}, **ROTATED, **SILU,
                        kv_heads=2),
    "olmo2": decoder("Olmo2", GROUPED, **ROTATED, **SILU, kv_heads=2, qk_norm=True,
                     norm_place="branch"),
    "cohere": decoder("Cohere", GROUPED, mask="causal", pairing="interleaved", **SILU,
                      kv_heads=2),
    "bert": encoder("Bert", LLM, **POST),
    "roberta": encoder("Roberta", LLM, **POST),
    "electra": encoder("Electra", LLM | {"embedding_size": 8}, **POST),
    "distilbert": encoder("DistilBert", {"vocab_size": 32, "dim": 16, "n_layers": 3, "n_heads": 4,
                                         "hidden_dim": 24, "max_position_embeddings": 32}, **POST),
    "albert": encoder("Albert", LLM | {"embedding_size": 8}, **POST, activation="gelu_tanh"),
    "deberta": encoder("DebertaV2", LLM | {"relative_attention": True, "pos_att_type": ["p2c"]},
                       norm_place="post", mask="input"),
    "modernbert": encoder("ModernBert", LLM | {"global_attn_every_n_layers": 3,
                                               "local_attention": 4}, mask="padding",
                          pairing="half", gated=True, norm_place="mixed"),
    "clip_text": encoder("CLIPText", LLM | {"projection_dim": 8}, mask="causal+padding",
                         activation="quick_gelu"),
    "t5_encoder": RealModel(
        model="T5EncoderModel", config="T5Config", options=T5, inputs=ENCODED,
        expected=Expected(mask="padding+bias", activation="relu")),
    "t5": RealModel(
        model="T5ForConditionalGeneration", config="T5Config", inputs=BOTH,
        options=T5 | {"use_cache": False, "decoder_start_token_id": 0},
        expected=Expected(blocks=(3, 3), attentions=1.5, mask="bias", activation="relu")),
    "bart": RealModel(
        model="BartModel", config="BartConfig", options=PAIR, inputs=BOTH,
        expected=Expected(blocks=(3, 3), attentions=1.5, norm_place="post")),
    "whisper": RealModel(
        model="WhisperModel", config="WhisperConfig", options=WHISPER,
        inputs={"input_features": numbers(2, 8, 16), "decoder_input_ids": token_ids(4),
                "use_cache": False},
        expected=Expected(blocks=(3, 3), attentions=1.5)),
    "wav2vec2": RealModel(
        model="Wav2Vec2Model", config="Wav2Vec2Config", options=WAV,
        inputs={"input_values": numbers(2, 200)},
        expected=Expected(blocks=(4,), attentions=0.75, networks=0.75, branches=0.25,
                          norm_place="post")),
    "conformer": RealModel(
        model="Wav2Vec2ConformerModel", config="Wav2Vec2ConformerConfig", options=WAV,
        inputs={"input_values": numbers(2, 200)},
        expected=Expected(networks=2, branches=1, inside=(0.94, 0.81)),
        gaps={"mask": "input", "source": "cross", "qk_norm": None},
        note="queries with a stored summand, scores with a relative part"),
    "mamba": RealModel(
        model="MambaModel", config="MambaConfig",
        options={"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4,
                 "use_cache": False},
        inputs={"input_ids": token_ids()}, expected=Expected(attentions=0, networks=0, branches=1,
                                                              inside=(0.21, 0.02)),
        note="selective scan: the branch is found, what it does is not understood"),
}  # fmt: skip
