"""Tiny models of every family the library is tested on, with perturbed weights.

``build(name)`` gives the library's own class at a tiny config, in eval mode and float32, and the
call to make. Every parameter and every normalisation statistic carries seeded noise, so that no
zero gate, unit scale or all-equal bias hides a branch from a test. The same name gives the same
bits every time, and the global generator is left alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.sources.examples import Example

Entry = tuple[nn.Module, Example]

VOCAB = 96


def names(library: str | None = None) -> list[str]:
    """Every name ``build`` knows; only those of "transformers", "diffusers" or "timm" if given."""
    return [name for name, (owner, _) in TINY.items() if library in (None, owner)]


def build(name: str, *, seed: int = 0) -> Entry:
    """The tiny model ``name`` in eval mode and the example to call it with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()) + seed)
        model, example = TINY[name][1]()
    return perturb(model, seed=seed).eval(), example


def perturb(model: nn.Module, *, seed: int = 0, scale: float = 0.05) -> nn.Module:
    """Add noise to every parameter and running statistic in place, seeded by its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(_noise(name, parameter, seed), alpha=scale)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(_noise(name, buffer, seed), alpha=scale)
            if name.endswith("running_var"):
                buffer.mul_(1 + scale * _noise(name, buffer, seed).abs())
    return model


def _noise(name: str, like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def randn(*shape: int, seed: int = 7) -> Tensor:
    """Seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(batch: int = 2, length: int = 12, *, vocab: int = VOCAB, seed: int = 7) -> Tensor:
    """Token ids that avoid the special ones at the bottom of the vocabulary."""
    return torch.randint(5, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(batch: int = 2, length: int = 12) -> Tensor:
    """Ones, except for the last two tokens of the last sequence."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return mask


def _text() -> Example:
    return Example((), {"input_ids": ids(), "attention_mask": padding()})


def _causal(config: str, model: str, **fields: Any) -> Callable[[], Entry]:
    def make() -> Entry:
        import transformers

        sizes = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        made = getattr(transformers, config)(**{**sizes, **fields})
        return getattr(transformers, model)(made), _text()

    return make


def _gpt2() -> Entry:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config), _text()


def _bert() -> Entry:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return BertModel(config), _text()


def _deberta() -> Entry:
    from transformers import DebertaV2Config, DebertaV2Model

    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
    return DebertaV2Model(DebertaV2Config(**fields)), _text()


def _t5() -> Entry:
    from transformers import T5Config, T5ForConditionalGeneration

    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    }
    example = Example(
        (),
        {
            "input_ids": ids(),
            "attention_mask": padding(),
            "decoder_input_ids": ids(length=8, seed=8),
        },
    )
    return T5ForConditionalGeneration(T5Config(**fields)), example


def _vit() -> Entry:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return ViTModel(config), Example((), {"pixel_values": randn(2, 3, 32, 32)})


def _whisper() -> Entry:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=16,
        max_target_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    example = Example((), {"input_features": randn(2, 16, 32), "decoder_input_ids": ids(length=8)})
    return WhisperForConditionalGeneration(config), example


def _unet() -> Entry:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return model, Example(
        (),
        {
            "sample": randn(2, 4, 16, 16),
            "timestep": torch.tensor([3, 17]),
            "encoder_hidden_states": randn(2, 6, 24, seed=8),
        },
    )


def _dit() -> Entry:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        norm_num_groups=8,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return model, Example(
        (),
        {
            "hidden_states": randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 7]),
            "class_labels": torch.tensor([1, 6]),
        },
    )


def _pixart() -> Entry:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        norm_num_groups=8,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=24,
        use_additional_conditions=False,
    )
    return model, Example(
        (),
        {
            "hidden_states": randn(2, 4, 8, 8),
            "encoder_hidden_states": randn(2, 6, 24, seed=8),
            "timestep": torch.tensor([3, 7]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "encoder_attention_mask": padding(length=6),
        },
    )


def _sd3() -> Entry:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return model, Example(
        (),
        {
            "hidden_states": randn(2, 4, 8, 8),
            "encoder_hidden_states": randn(2, 6, 24, seed=8),
            "pooled_projections": randn(2, 20, seed=9),
            "timestep": torch.tensor([3.0, 17.0]),
        },
    )


def _flux() -> Entry:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    )
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(16, 3).float()
    return model, Example(
        (),
        {
            "hidden_states": randn(2, 16, 8),
            "encoder_hidden_states": randn(2, 6, 24, seed=8),
            "pooled_projections": randn(2, 20, seed=9),
            "timestep": torch.tensor([0.3, 0.7]),
            "img_ids": img_ids,
            "txt_ids": torch.zeros(6, 3),
            "guidance": torch.tensor([3.5, 3.5]),
        },
    )


def _autoencoder() -> Entry:
    from diffusers import AutoencoderKL

    fields: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 16,
    }
    return AutoencoderKL(**fields), Example((), {"sample": randn(2, 3, 16, 16)})


def _timm(architecture: str, size: int, **arguments: Any) -> Callable[[], Entry]:
    def make() -> Entry:
        import timm

        model = timm.create_model(architecture, num_classes=10, **arguments)
        return model, Example((randn(2, 3, size, size),))

    return make


def _metaformer(architecture: str, **arguments: Any) -> Entry:
    """A MetaFormer with other depths, which timm's registered functions fix."""
    from timm.models import build_model_with_cfg
    from timm.models.metaformer import MetaFormer

    model = build_model_with_cfg(
        MetaFormer,
        architecture,
        False,
        depths=(2, 2, 2, 2),
        dims=(8, 16, 32, 64),
        num_classes=10,
        feature_cfg={"out_indices": (0, 1, 2, 3)},
        **arguments,
    )
    return model, Example((randn(2, 3, 64, 64),))


def _poolformer() -> Entry:
    from timm.layers import GroupNorm1

    return _metaformer(
        "poolformer_s12",
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
    )


def _caformer() -> Entry:
    from timm.models.metaformer import (
        Attention,
        LayerNorm2dNoBias,
        LayerNormNoBias,
        SepConv,
    )

    return _metaformer(
        "caformer_s18",
        token_mixers=[SepConv, SepConv, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
    )


TINY: dict[str, tuple[str, Callable[[], Entry]]] = {
    "llama": ("transformers", _causal("LlamaConfig", "LlamaForCausalLM")),
    "qwen3": (
        "transformers",
        _causal("Qwen3Config", "Qwen3ForCausalLM", head_dim=8),
    ),
    "gemma3_text": (
        "transformers",
        _causal(
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            num_hidden_layers=3,
        ),
    ),
    "gpt2": ("transformers", _gpt2),
    "bert": ("transformers", _bert),
    "t5": ("transformers", _t5),
    "deberta-v2": ("transformers", _deberta),
    "mixtral": (
        "transformers",
        _causal(
            "MixtralConfig",
            "MixtralForCausalLM",
            num_hidden_layers=3,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    "qwen3_moe": (
        "transformers",
        _causal(
            "Qwen3MoeConfig",
            "Qwen3MoeForCausalLM",
            num_hidden_layers=3,
            head_dim=8,
            moe_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    "vit": ("transformers", _vit),
    "whisper": ("transformers", _whisper),
    "UNet2DConditionModel": ("diffusers", _unet),
    "DiTTransformer2DModel": ("diffusers", _dit),
    "PixArtTransformer2DModel": ("diffusers", _pixart),
    "SD3Transformer2DModel": ("diffusers", _sd3),
    "FluxTransformer2DModel": ("diffusers", _flux),
    "AutoencoderKL": ("diffusers", _autoencoder),
    "timm_vit": (
        "timm",
        _timm(
            "vit_tiny_patch16_224",
            32,
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=3,
            num_heads=4,
        ),
    ),
    "timm_swin": (
        "timm",
        _timm(
            "swin_tiny_patch4_window7_224",
            32,
            img_size=32,
            window_size=4,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
        ),
    ),
    "timm_convnext": (
        "timm",
        _timm("convnext_atto", 64, depths=(1, 1, 3, 1), dims=(8, 16, 24, 32)),
    ),
    "timm_poolformer": ("timm", _poolformer),
    "timm_caformer": ("timm", _caformer),
    "timm_eva": (
        "timm",
        _timm(
            "eva02_tiny_patch14_224",
            32,
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=3,
            num_heads=4,
        ),
    ),
    "timm_resnet": (
        "timm",
        _timm("resnet26", 32, layers=(2, 2, 1, 1), channels=(8, 16, 24, 32), stem_width=16),
    ),
    "timm_efficientnet": (
        "timm",
        _timm("test_efficientnet", 64, channel_multiplier=0.5, depth_multiplier=2.0),
    ),
}
