"""Models that no other test knows, as specs with tiny configurations.

They are what an outsider would bring along: nothing in the library was written with them in mind.
The examples to call them with are inferred, as they would be for an outsider.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

import surgery
from surgery.sources import Example, infer_example
from tests.sweep.examples import EXAMPLES
from tests.zoo import perturb


class Model(Protocol):
    """What is examined: a name, and how to build it."""

    @property
    def name(self) -> str: ...
    @property
    def library(self) -> str: ...
    def build(self) -> tuple[nn.Module, Example]: ...


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        spec: What ``surgery.load`` is given.
        config: Overrides that make it tiny.
        fast: Whether it is one of the few that the test suite checks every time.
    """

    spec: str
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    fast: bool = False

    @property
    def name(self) -> str:
        return self.spec.partition(":")[2]

    @property
    def library(self) -> str:
        return self.spec.partition(":")[0]

    def build(self) -> tuple[nn.Module, Example]:
        """The perturbed model in eval mode and the call to make."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = surgery.load(self.spec, config=self.config, dtype="float32")
        perturb(model).eval()
        written = EXAMPLES.get(self.name)
        return model, infer_example(model) if written is None else written()


def _timm(name: str, *, fast: bool = False, **config: Any) -> Case:
    return Case(f"timm:{name}", {"num_classes": 10, **config}, fast)


def _transformers(name: str, *, fast: bool = False, **config: Any) -> Case:
    return Case(f"transformers:{name}", config, fast)


def _diffusers(name: str, *, fast: bool = False, **config: Any) -> Case:
    return Case(f"diffusers:{name}", config, fast)


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}

_DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2}
_ENCODER: dict[str, Any] = {
    key: value for key, value in _DECODER.items() if key not in ("bos_token_id", "eos_token_id")
}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT_TOWER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SPEECH: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}
_VAE = {
    "block_out_channels": [16, 32],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
}

TIMM = (
    _timm("deit_tiny_distilled_patch16_224", **_VIT),
    _timm("beit_base_patch16_224", **_VIT, fast=True),
    _timm("beit3_base_patch16_224", **_VIT),
    _timm("cait_xxs24_224", **{**_VIT, "depth": 3}),
    _timm("xcit_nano_12_p16_224", img_size=32, embed_dim=32, depth=3, num_heads=4),
    _timm("pvt_v2_b0", depths=(2, 2, 2, 2), embed_dims=(8, 16, 40, 64)),
    _timm("mobilevit_xxs"),
    _timm("mobilevitv2_050"),
    _timm("coat_tiny", img_size=64),
    _timm("coat_lite_tiny", img_size=64),
    _timm("levit_128s", img_size=64),
    _timm("levit_conv_128s", img_size=64),
    _timm("test_maxvit"),
    _timm("test_coatnet"),
    _timm("nest_tiny", img_size=32),
    _timm("twins_pcpvt_small", img_size=64, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4)),
    _timm("twins_svt_small", img_size=64, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4)),
    _timm("volo_d1_224", img_size=64),
    _timm("mixer_s32_224", img_size=64),
    _timm("resmlp_12_224", img_size=64),
    _timm("gmlp_ti16_224", img_size=64),
    _timm("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
    _timm("repvit_m0_9"),
    _timm("regnety_002"),
    _timm("mobilenetv3_small_050"),
    _timm("mobilenetv4_hybrid_medium"),
    _timm("efficientformer_l1"),
    _timm("efficientformerv2_s0"),
    _timm("hiera_tiny_224", img_size=(64, 64), embed_dim=16, stages=(1, 1, 2, 1)),
    _timm("davit_tiny", depths=(2, 2, 2, 2), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4)),
    _timm("focalnet_tiny_srf"),
    _timm("vitamin_small_224", img_size=64),
    _timm(
        "swinv2_tiny_window8_256",
        img_size=64,
        window_size=2,
        embed_dim=16,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
    ),
    _timm(
        "swinv2_cr_tiny_224",
        img_size=64,
        window_size=2,
        embed_dim=16,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
    ),
    _timm("convit_tiny", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4),
    _timm("crossvit_9_240"),
    _timm("gcvit_xxtiny", img_size=64),
    _timm("mvitv2_tiny", img_size=64),
    _timm("pit_ti_224", img_size=64),
    _timm(
        "tnt_s_patch16_224",
        img_size=64,
        depth=3,
        embed_dim=32,
        inner_dim=8,
        num_heads_inner=2,
        num_heads_outer=4,
    ),
    _timm("visformer_tiny", img_size=64),
    _timm("tiny_vit_5m_224"),
    _timm("efficientvit_b0"),
    _timm("efficientvit_m0", img_size=64),
    _timm("edgenext_xx_small"),
    _timm("fastvit_sa12"),
    _timm("test_mambaout"),
    _timm("test_nfnet"),
    _timm("sequencer2d_s", img_size=64),
    _timm("halonet26t"),
    _timm("lambda_resnet26t"),
    _timm("botnet26t_256", img_size=64),
    _timm("naflexvit_base_patch16_gap", embed_dim=32, depth=3, num_heads=4),
    _timm("inception_next_atto"),
    _timm("rdnet_tiny", num_init_features=16, growth_rates=(8, 8, 8, 8, 8, 8, 8)),
)

TRANSFORMERS = (
    _transformers("MistralForCausalLM", **_GROUPED, sliding_window=8, fast=True),
    _transformers("PhiForCausalLM", **_DECODER),
    _transformers("Phi3ForCausalLM", **_GROUPED, fast=True),
    _transformers("GemmaForCausalLM", **_GROUPED, head_dim=8),
    _transformers("Gemma2ForCausalLM", **_GROUPED, head_dim=8, query_pre_attn_scalar=8),
    _transformers("Qwen2ForCausalLM", **_GROUPED),
    _transformers("Olmo2ForCausalLM", **_GROUPED),
    _transformers("CohereForCausalLM", **_GROUPED),
    _transformers("GraniteForCausalLM", **_GROUPED),
    _transformers("StableLmForCausalLM", **_GROUPED),
    _transformers("Starcoder2ForCausalLM", **_GROUPED),
    _transformers(
        "FalconForCausalLM",
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        multi_query=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
    _transformers("GPTNeoXForCausalLM", **_DECODER),
    _transformers(
        "GPTJForCausalLM",
        vocab_size=96,
        n_embd=32,
        n_layer=3,
        n_head=4,
        rotary_dim=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    _transformers(
        "GPTNeoForCausalLM",
        vocab_size=96,
        hidden_size=32,
        num_layers=4,
        attention_types=[[["global", "local"], 2]],
        num_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    _transformers(
        "OPTForCausalLM",
        vocab_size=96,
        hidden_size=32,
        word_embed_proj_dim=24,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    _transformers("BloomForCausalLM", vocab_size=96, hidden_size=32, n_layer=3, n_head=4),
    _transformers(
        "MptForCausalLM", vocab_size=96, d_model=32, n_layers=3, n_heads=4, max_seq_len=64
    ),
    _transformers("GptOssForCausalLM", **_GROUPED, head_dim=8, num_local_experts=4),
    _transformers(
        "DeepseekV3ForCausalLM",
        **{**_GROUPED, "num_key_value_heads": 4},
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    _transformers("OlmoeForCausalLM", **_GROUPED, num_experts=4, num_experts_per_tok=2),
    _transformers(
        "MambaForCausalLM",
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=3,
        state_size=4,
        time_step_rank=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    _transformers(
        "Mamba2ForCausalLM",
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=3,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    _transformers(
        "Qwen2VLForConditionalGeneration",
        text_config={
            **_GROUPED,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            },
        },
        vision_config={
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
        },
    ),
    _transformers("RobertaModel", **_ENCODER),
    _transformers("ElectraModel", **_ENCODER, embedding_size=24),
    _transformers("AlbertModel", **_ENCODER, embedding_size=24, fast=True),
    _transformers(
        "DistilBertModel",
        vocab_size=96,
        dim=32,
        hidden_dim=48,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=64,
    ),
    _transformers("MPNetModel", **{**_ENCODER, "pad_token_id": 1}),
    _transformers("XLNetModel", vocab_size=96, d_model=32, n_layer=3, n_head=4, d_inner=48),
    _transformers(
        "ModernBertModel",
        **_ENCODER,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    _transformers("DebertaModel", **_ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _transformers("BartForConditionalGeneration", **_SEQ2SEQ),
    _transformers("MBartForConditionalGeneration", **_SEQ2SEQ),
    _transformers(
        "PegasusForConditionalGeneration",
        **{k: v for k, v in _SEQ2SEQ.items() if k != "bos_token_id"},
    ),
    _transformers(
        "MT5ForConditionalGeneration",
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    _transformers(
        "T5GemmaForConditionalGeneration",
        encoder={**_GROUPED, "head_dim": 8},
        decoder={**_GROUPED, "head_dim": 8},
        vocab_size=96,
    ),
    _transformers("CLIPModel", text_config=_TEXT_TOWER, vision_config=_VISION, projection_dim=24),
    _transformers("SiglipModel", text_config=_TEXT_TOWER, vision_config=_VISION),
    _transformers(
        "Dinov2Model",
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        mlp_ratio=2,
    ),
    _transformers(
        "DINOv3ViTModel",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    ),
    _transformers(
        "SwinModel",
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    _transformers(
        "Swinv2Model",
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    _transformers("BeitModel", **_VISION, use_relative_position_bias=True),
    _transformers("DeiTModel", **_VISION),
    _transformers(
        "SegformerForSemanticSegmentation",
        hidden_sizes=[8, 16, 24, 32],
        depths=[2, 2, 2, 2],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=16,
    ),
    _transformers("ConvNextV2Model", hidden_sizes=[8, 16, 24, 32], depths=[2, 2, 2, 2]),
    _transformers("Wav2Vec2ForCTC", **_SPEECH, fast=True),
    _transformers("HubertModel", **_SPEECH),
    _transformers("WavLMModel", **_SPEECH),
)

DIFFUSERS = (
    _diffusers(
        "UNet2DModel",
        sample_size=16,
        block_out_channels=[16, 32],
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=8,
    ),
    _diffusers(
        "Transformer2DModel",
        norm_type="layer_norm",
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=8,
        num_layers=3,
        norm_num_groups=8,
        cross_attention_dim=24,
    ),
    _diffusers(
        "HunyuanDiT2DModel",
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=24,
        cross_attention_dim_t5=24,
        pooled_projection_dim=20,
        text_len=6,
        text_len_t5=6,
    ),
    _diffusers(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    ),
    _diffusers(
        "Lumina2Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[16, 16, 16],
        cap_feat_dim=24,
    ),
    _diffusers(
        "CogVideoXTransformer3DModel",
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
    ),
    _diffusers(
        "WanTransformer3DModel",
        fast=True,
        patch_size=[1, 2, 2],
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=32,
    ),
    _diffusers(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=24,
    ),
    _diffusers(
        "SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
    ),
    _diffusers(
        "StableAudioDiTModel",
        sample_size=16,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=24,
        time_proj_dim=16,
        global_states_input_dim=32,
        cross_attention_input_dim=24,
    ),
    _diffusers(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=[8, 4, 4],
    ),
    _diffusers(
        "MochiTransformer3DModel",
        patch_size=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=8,
        max_sequence_length=8,
    ),
    _diffusers(
        "UVit2DModel",
        hidden_size=32,
        cond_embed_dim=24,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=24,
        vocab_size=40,
        codebook_size=32,
        in_channels=32,
        block_out_channels=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        block_num_heads=4,
        sample_size=8,
    ),
    _diffusers(
        "PriorTransformer",
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=3,
        embedding_dim=24,
        num_embeddings=6,
        additional_embeddings=4,
    ),
    _diffusers(
        "UNet3DConditionModel",
        sample_size=8,
        block_out_channels=[16, 32],
        down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"],
        up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"],
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=8,
    ),
    _diffusers(
        "ControlNetModel",
        block_out_channels=[16, 32],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
        conditioning_embedding_out_channels=[8, 16],
    ),
    _diffusers(
        "AutoencoderKLTemporalDecoder",
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        layers_per_block=2,
    ),
    _diffusers(
        "VQModel",
        block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        layers_per_block=2,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=8,
    ),
    _diffusers(
        "AsymmetricAutoencoderKL",
        down_block_out_channels=[16, 32],
        up_block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        norm_num_groups=8,
    ),
    _diffusers(
        "AutoencoderDC",
        in_channels=3,
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=["ResBlock", "EfficientViTBlock"],
        decoder_block_types=["ResBlock", "EfficientViTBlock"],
        encoder_block_out_channels=[16, 16],
        decoder_block_out_channels=[16, 16],
        encoder_layers_per_block=[2, 2],
        decoder_layers_per_block=[2, 2],
        encoder_qkv_multiscales=[[], [5]],
        decoder_qkv_multiscales=[[], [5]],
    ),
)

CASES = {case.name: case for case in (*TIMM, *TRANSFORMERS, *DIFFUSERS)}
