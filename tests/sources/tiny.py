"""Tiny transformers architectures, made by shrinking the fields that size them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from torch import nn

# A field of this name is set to this value where its default is larger.
SIZES = {
    "attention_head_size": 8,
    "conv_dim": 32,
    "d_ff": 48,
    "d_kv": 8,
    "d_model": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "decoder_layers": 2,
    "depth": 2,
    "dim": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "encoder_layers": 2,
    "ffn_dim": 48,
    "head_dim": 8,
    "hidden_dim": 32,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "image_size": 32,
    "intermediate_size": 48,
    "kv_lora_rank": 16,
    "max_length": 64,
    "max_position_embeddings": 64,
    "max_source_positions": 32,
    "max_target_positions": 64,
    "moe_intermediate_size": 24,
    "n_embd": 32,
    "n_head": 4,
    "n_heads": 4,
    "n_inner": 48,
    "n_layer": 2,
    "n_layers": 2,
    "n_positions": 64,
    "n_routed_experts": 4,
    "num_attention_heads": 4,
    "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 16,
    "num_decoder_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_layers": 2,
    "num_local_experts": 4,
    "num_mel_bins": 16,
    "out_hidden_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "query_pre_attn_scalar": 8,
    "shared_expert_intermediate_size": 24,
    "sliding_window": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "v_head_dim": 8,
    "vocab_size": 200,
    "vocab_size_per_layer_input": 200,
}

# What shrinking alone leaves inconsistent.
SPECIAL: dict[str, dict[str, Any]] = {
    "swin": {
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 4,
        "patch_size": 4,
    },
    "swinv2": {
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 4,
        "patch_size": 4,
    },
    "informer": {"prediction_length": 4, "context_length": 8, "num_time_features": 1},
    "time_series_transformer": {
        "prediction_length": 4,
        "context_length": 8,
        "num_time_features": 1,
    },
    "deepseek_v3": {"head_dim": 8, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "qwen3_next": {"num_hidden_layers": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
}


def tiny(model_type: str) -> nn.Module:
    """The plain model of ``model_type`` at a tiny size, in eval mode."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    config = config_class(**(shrunk(config_class) | SPECIAL.get(model_type, {})))
    found = transformers.MODEL_MAPPING[config_class]
    model_class: Any = found[0] if isinstance(found, (tuple, list)) else found
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval()


def shrunk(config_class: Any) -> dict[str, Any]:
    """Arguments that make ``config_class``, and what is nested in it, tiny."""
    small: dict[str, Any] = {
        field.name: SIZES[field.name]
        for field in dataclasses.fields(config_class)
        if type(field.default) is int and field.default > SIZES.get(field.name, field.default)
    }
    tokens = [
        field.name
        for field in dataclasses.fields(config_class)
        if field.name.endswith(("_token_id", "_token_index"))
        and type(field.default) is int
        and field.default >= SIZES["vocab_size"] - 20
    ]
    small |= {name: SIZES["vocab_size"] - 1 - number for number, name in enumerate(tokens)}
    for key, spec in config_class.sub_configs_defaults.items():
        if not spec.optional:
            nested: Any = transformers.CONFIG_MAPPING[spec.model_type]
            small[key] = nested(**(dict(spec.init_kwargs) | shrunk(nested)))
    return small
