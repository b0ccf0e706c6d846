"""Example inputs, over as many architectures as the installed libraries give at a tiny size."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import timm
import torch
from torch import Tensor, nn

from surgery import SourceError
from surgery.sources import Example, infer_example, variants
from tests import zoo
from tests.sources.tiny import tiny

# Nothing in this list has a rule of its own; it is only what is run.
TRANSFORMERS = """
    afmoe aimv2 albert altclip apertus arcee aria audio-spectrogram-transformer aya_vision bart beit
    bert bert-generation big_bird bigbird_pegasus biogpt bit bitnet blenderbot blip bloom camembert
    chinese_clip clip clipseg cohere cohere2 convbert convnext convnextv2 ctrl cvt data2vec-text
    data2vec-vision deberta deberta-v2 deit detr diffllama dinov2 dinov3_vit distilbert dpr dpt
    electra encodec ernie ernie4_5 exaone4 falcon falcon_h1 falcon_mamba flava fnet focalnet fsmt
    funnel gemma gemma2 gemma3 gemma3_text git glm glm4 glpn gpt2 gpt_bigcode gpt_neox gpt_oss
    granite granitemoe groupvit helium hiera hubert ibert idefics3 internvl jetmoe layoutlm led lfm2
    llama llama4_text llava longformer longt5 lxmert m2m_100 mamba marian markuplm mbart
    megatron-bert minimax mistral mistral3 mixtral mobilebert mobilenet_v2 mobilevit modernbert
    moonshine mpnet mpt mra mt5 musicflamingo mvp nemotron_h nllb-moe nystromformer olmo olmo2 olmoe
    opt owlvit paligemma patchtsmixer patchtst pegasus persimmon phi phi3 phimoe pixtral plbart
    poolformer prophetnet pvt qwen2 qwen2_5_vl_vision qwen2_audio qwen2_moe qwen3 qwen3_moe qwen3_vl
    regnet rembert resnet roberta roc_bert roformer rwkv segformer sew siglip smollm3 smolvlm
    speech_to_text splinter squeezebert stablelm starcoder2 swiftformer switch_transformers t5
    t5gemma tapas timesformer udop umt5 unispeech videomae vilt vipllava visual_bert vit vit_mae
    vit_msn vivit wav2vec2 wav2vec2-bert wavlm whisper xglm xlm-roberta xlnet yoso
    swin swinv2 informer time_series_transformer deepseek_v3 qwen3_next jamba codegen gptj
"""

HEADS = [
    ("BertForSequenceClassification", "bert"),
    ("BertForQuestionAnswering", "bert"),
    ("BertForMaskedLM", "bert"),
    ("LlamaForCausalLM", "llama"),
    ("T5ForConditionalGeneration", "t5"),
    ("T5EncoderModel", "t5"),
    ("ViTForImageClassification", "vit"),
    ("Wav2Vec2ForCTC", "wav2vec2"),
    ("CLIPTextModel", "clip_text_model"),
    ("CLIPVisionModel", "clip_vision_model"),
]

SMALL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
BLOCKS: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
CROSS: dict[str, Any] = BLOCKS | {"cross_attention_dim": 24, "attention_head_dim": 8}
PACKED: dict[str, Any] = SMALL | {
    "in_channels": 8,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
WAN: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
STATISTICS: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}

DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": (
        "UNet2DModel",
        BLOCKS
        | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "unet with classes": (
        "UNet2DModel",
        BLOCKS
        | {
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "num_class_embeds": 5,
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        CROSS
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
    ),
    "unet 3d": (
        "UNet3DConditionModel",
        CROSS
        | {
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
    ),
    "controlnet": (
        "ControlNetModel",
        CROSS
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "conditioning_embedding_out_channels": (8, 8, 8, 8),
        },
    ),
    "vq": (
        "VQModel",
        BLOCKS
        | {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
    ),
    "tiny autoencoder": (
        "AutoencoderTiny",
        {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4},
    ),
    "cogvideo autoencoder": ("AutoencoderKLCogVideoX", BLOCKS | {"block_out_channels": (16,) * 4}),
    "wan autoencoder": ("AutoencoderKLWan", WAN | STATISTICS),
    "sound autoencoder": (
        "AutoencoderOobleck",
        {
            "encoder_hidden_size": 8,
            "decoder_channels": 8,
            "downsampling_ratios": [2, 4],
            "channel_multiples": [1, 2],
            "decoder_input_channels": 4,
        },
    ),
    "transformer 2d": (
        "Transformer2DModel",
        SMALL | {"in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": 24},
    ),
    "flux with guidance": (
        "FluxTransformer2DModel",
        PACKED | {"num_single_layers": 1, "pooled_projection_dim": 20, "guidance_embeds": True},
    ),
    "flux 2": (
        "Flux2Transformer2DModel",
        PACKED | {"num_single_layers": 1, "axes_dims_rope": (4, 4, 4, 4)},
    ),
    "qwen image": ("QwenImageTransformer2DModel", PACKED | {"in_channels": 16}),
    "aura flow": (
        "AuraFlowTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "sample_size": 16,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
    ),
    "cogvideo": (
        "CogVideoXTransformer3DModel",
        SMALL
        | {
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 8,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 8,
        },
    ),
    "cogview": (
        "CogView3PlusTransformer2DModel",
        SMALL
        | {
            "in_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "sample_size": 8,
            "pos_embed_max_size": 8,
        },
    ),
    "hunyuan video": (
        "HunyuanVideoTransformer3DModel",
        SMALL
        | {
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "in_channels": 4,
            "text_embed_dim": 24,
            "pooled_projection_dim": 20,
            "rope_axes_dim": (4, 6, 6),
        },
    ),
    "ltx video": (
        "LTXVideoTransformer3DModel",
        SMALL | {"in_channels": 8, "cross_attention_dim": 32, "caption_channels": 24},
    ),
    "lumina": (
        "Lumina2Transformer2DModel",
        {
            "hidden_size": 48,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "in_channels": 4,
            "sample_size": 8,
            "multiple_of": 2,
            "cap_feat_dim": 24,
            "axes_dim_rope": (4, 8, 4),
            "axes_lens": (128, 128, 128),
        },
    ),
    "sana": (
        "SanaTransformer2DModel",
        SMALL
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 8,
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        SMALL
        | {"in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 32},
    ),
    "prior": (
        "PriorTransformer",
        SMALL | {"embedding_dim": 16, "num_embeddings": 7, "additional_embeddings": 4},
    ),
}

TIMM = """
    test_vit test_resnet test_efficientnet test_convnext test_byobnet beit_base_patch16_224
    botnet26t_256 cait_xxs24_224 coat_lite_tiny convit_tiny crossvit_tiny_240 densenet121 dla34
    edgenext_xx_small efficientformer_l1 ghostnet_050 hardcorenas_a inception_next_atto
    lcnet_035 levit_128s maxvit_rmlp_pico_rw_256 mixer_s32_224 mobilenetv3_small_050 mobilevit_xxs
    nfnet_l0 pit_ti_224 poolformerv2_s12 pvt_v2_b0 regnetx_002 repvgg_a0 swin_s3_tiny_224
    tiny_vit_5m_224 visformer_tiny xcit_nano_12_p16_224
"""


def run(model: nn.Module, example: Example) -> list[Tensor]:
    with torch.no_grad():
        output: Any = model(*example.args, **example.kwargs)
    values = output.values() if isinstance(output, dict) else output
    found = [values] if isinstance(values, Tensor) else [v for v in values if isinstance(v, Tensor)]
    assert found, "the call gave no tensor"
    return found


@pytest.mark.filterwarnings("ignore")  # the libraries', on configurations of no practical use
@pytest.mark.parametrize("model_type", TRANSFORMERS.split())
def test_transformers(model_type: str) -> None:
    model = tiny(model_type)
    example = infer_example(model)
    run(model, example)
    assert max(tensor.numel() for tensor in example.tensors()) < 400_000


@pytest.mark.parametrize(("name", "model_type"), HEADS)
def test_heads(name: str, model_type: str) -> None:
    import transformers

    plain: Any = tiny(model_type)
    model = getattr(transformers, name)(plain.config).eval()
    run(model, infer_example(model))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers, of what it imports itself
@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(name: str) -> None:
    class_name, config = DIFFUSERS[name]
    model = getattr(diffusers, class_name)(**config).eval()
    run(model, infer_example(model))


@pytest.mark.parametrize("name", TIMM.split())
def test_timm(name: str) -> None:
    model = timm.create_model(name).eval()
    (image,) = infer_example(model).args
    run(model, Example((image,)))
    assert image.shape[-1] <= 256


@pytest.mark.parametrize("name", zoo.names())
def test_zoo_and_its_variants(name: str) -> None:
    model, _ = zoo.build(name)
    example = infer_example(model)
    assert example.batch() == 2
    run(model, example)
    others = variants(example)
    assert others[0].batch() == 3
    for other in others:
        run(model, other)
    assert len(others) == (2 if takes_sequence(example) else 1)


def takes_sequence(example: Example) -> bool:
    return any(t.ndim == 2 and not t.is_floating_point() for t in example.tensors())


@pytest.mark.filterwarnings("ignore:There are modules in")  # diffusers, on any cast of dtype
@pytest.mark.parametrize("name", ["llama", "UNet2DConditionModel", "timm_vit"])
def test_on_the_models_device_and_dtype(name: str) -> None:
    model, _ = zoo.build(name)
    run(model.to(torch.bfloat16), infer_example(model))
    example = infer_example(model.to("meta"))
    assert all(tensor.is_meta for tensor in example.tensors())
    floating = [tensor.dtype for tensor in example.tensors() if tensor.is_floating_point()]
    assert set(floating) <= {torch.bfloat16}


def test_is_seeded_and_leaves_the_global_generator_alone() -> None:
    model, _ = zoo.build("bert")
    before = torch.random.get_rng_state()
    first, second = infer_example(model), infer_example(model)
    other = infer_example(model, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.kwargs["input_ids"], second.kwargs["input_ids"])
    assert not torch.equal(first.kwargs["input_ids"], other.kwargs["input_ids"])


def test_batch_size_and_padding() -> None:
    model, _ = zoo.build("llama")
    example = infer_example(model, batch=3)
    assert example.kwargs["input_ids"].shape == (3, 12)
    assert example.kwargs["attention_mask"].sum(dim=1).tolist() == [12, 12, 10]


def test_special_tokens_are_avoided() -> None:
    model: Any = zoo.build("llama")[0]
    ids = infer_example(model, batch=64).kwargs["input_ids"]
    config = model.config
    assert not torch.isin(ids, torch.tensor([config.bos_token_id, config.pad_token_id])).any()
    # One end in each row, for the heads that pool there.
    assert (ids == config.eos_token_id).sum(dim=1).tolist() == [1] * 64


class Own(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float) -> Tensor:
        return x * scale if mask is None else x * mask


class OwnWithDefaultCfg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (3, 24, 40), "fixed_input_size": True}
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_a_class_of_the_users_own_with_a_default_cfg() -> None:
    model = OwnWithDefaultCfg()
    example = infer_example(model)
    assert example.args[0].shape == (2, 3, 24, 40)
    run(model, example)


def test_a_subclass_of_the_users_own() -> None:
    from transformers import BertModel

    class OwnBert(BertModel):
        pass

    config: Any = zoo.build("bert")[0].config
    model = OwnBert(config).eval()
    run(model, infer_example(model))


def test_shows_the_signature_and_the_call_to_write() -> None:
    with pytest.raises(SourceError) as caught:
        infer_example(Own())
    message = str(caught.value)
    assert "no example input could be inferred for Own" in message
    assert "forward(x: 'Tensor', mask: 'Tensor | None' = None, *, scale: 'float')" in message
    assert "example={'x': tensor, 'scale': tensor}" in message


def test_names_the_input_that_no_rule_makes() -> None:
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    config = DecisionTransformerConfig(hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(SourceError, match="no rule makes 'states'"):
        infer_example(DecisionTransformerModel(config))
