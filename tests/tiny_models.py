"""Tiny random models of every causal architecture that transformers ships."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
WINDOW = 7
"""Sliding windows and chunks are shorter than the prompts of the tests."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "embedding_size": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "num_layers": 3,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_shared_experts": 1,
    "rotary_dim": 4,
    "router_hidden_size": 16,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}

_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
_FULL_AND_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_DECODING_ENCODERS = """
bert bert-generation camembert data2vec-text electra ernie roberta roberta-prelayernorm roc_bert
xlm-roberta xlm-roberta-xl
"""
_KINDS_OF_LAYERS = ("full_attention", "sliding_attention")
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in _DECODING_ENCODERS.split()},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(_KINDS_OF_LAYERS, _ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
    },
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "ministral": {**_HEADS, "layer_types": _FULL_AND_SLIDING},
    "nemotron": {"num_key_value_heads": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    },
    "longcat_flash": {"head_dim": 4, "qk_head_dim": 12},
    "gemma2": {"layer_types": _FULL_AND_SLIDING},
    "gpt_oss": {"layer_types": _FULL_AND_SLIDING},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
        "intermediate_size_mlp": 64,
    },
    "exaone4": {"layer_types": _FULL_AND_SLIDING},
    "cohere2": {"layer_types": _FULL_AND_SLIDING},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
}
"""What a model type needs besides."""


def tiny_config(model_type: str, **options: Any) -> Any:
    """A configuration of that type, as small as its fields allow."""
    if model_type in _TEXT_PARTS:
        return _with_encoders(model_type)
    kind = type(AutoConfig.for_model(model_type))
    default = kind()
    given = default.to_dict()
    known = {name for name in _SIZES if given.get(name) is not None}
    known |= {"vocab_size", "initializer_range", "eos_token_id", "bos_token_id", "pad_token_id"}
    sizes = {name: _SIZES[name] for name in known}
    sizes["tie_word_embeddings"] = False
    if "kv_lora_rank" in known:  # multi-head latent attention has no groups
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        sizes.pop("head_dim", None)
        sizes.pop("qk_head_dim", None)
    return kind(**{**sizes, **_SPECIAL.get(model_type, {}), **options})


def tiny_model(model_type: str, **options: Any) -> PreTrainedModel:
    """A random model in float32 whose greedy text does not soon repeat itself."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **options)).float().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


_TEXT_PARTS = {
    "emu3": "emu3_text_model",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "mllama": "mllama_text_model",
}
ENCODER_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}


def _with_encoders(model_type: str) -> Any:
    """A multimodal configuration around a tiny text model."""
    kind = type(AutoConfig.for_model(model_type))
    parts: dict[str, Any] = {name: dict(ENCODER_SIZES) for name in kind.sub_configs}
    parts["text_config"] = tiny_config(_TEXT_PARTS[model_type]).to_dict()
    return kind(**parts)
