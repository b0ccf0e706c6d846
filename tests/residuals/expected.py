"""How many residual additions models have, from reading their sources.

Each row says where the count comes from. Additions are counted as the definition in
``surgery.residuals`` has it: one per sum, however many parallel branches it has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.capture import trace_model
from surgery.residuals import Findings, examine


@dataclass(frozen=True)
class Timm:
    """A timm model, built on the meta device.

    Attributes:
        name: As timm registers it.
        count: Residual additions.
        projections: Those of them whose shortcut is projected.
        config: Arguments of ``timm.create_model``.
        side: Height and width of the images.
    """

    name: str
    count: int
    projections: int = 0
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    side: int = 64

    def findings(self) -> Findings:
        """What is found in it."""
        import timm

        with torch.device("meta"):
            model = timm.create_model(self.name, **self.config).eval()
        return found(model, (torch.empty(2, 3, self.side, self.side, device="meta"),), {})


def found(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Findings:
    """The residual additions of a model that is called in this way."""
    return examine(trace_model(model, args, kwargs).graph, model)


_VIT: dict[str, Any] = {"img_size": 64, "patch_size": 16, "depth": 3}

CONVOLUTIONAL = (
    # one per block; a downsample where the shape changes
    Timm("resnet18", 8, 3),
    Timm("resnet50", 16, 4),
    Timm("resnet26d", 8, 4),
    Timm("resnetv2_50", 16, 4),
    Timm("seresnet18", 8, 3),
    Timm("skresnet18", 8, 3),
    # the additions between the parts of Res2Net's bottleneck are none
    Timm("res2net50_26w_4s", 16, 4),
    Timm("resnest14d", 4, 4),
    Timm("tresnet_m", 21, 3),
    # every block of a RegNet adds; the first of each of four stages projects
    Timm("regnety_002", 13, 4),
    Timm("test_nfnet", 4, 4),
    # 16 blocks, of which the first of each of 7 stages changes width or resolution
    Timm("efficientnet_b0", 9),
    # 1 + 1 + 2 + 3 + 1 + 2
    Timm("mobilenetv3_large_100", 10),
    # 16 Ghost bottlenecks; five shortcuts are separable convolutions
    Timm("ghostnet_100", 16, 5),
    # a residual on the first channels of a block, where it does not narrow: 1 + 1 + 2 + 3 + 4
    Timm("rexnet_100", 11),
    # depths 2, 2, 6, 2
    Timm("convnext_atto", 12),
    # the same; the addition in GRN is none
    Timm("convnextv2_atto", 12),
    # identity branches, which are BatchNorms, where the stride is 1: 1 + 3 + 13 + 0
    Timm("repvgg_a0", 17, 17),
    # only blocks after the first of a stage have one: depths 1, 1, 2, 2
    Timm("ese_vovnet39b", 2),
    Timm("ese_vovnet19b_dw", 0),
    # trees of 2, 4, 4 and 2 blocks; each tree changes the width
    Timm("dla34", 12, 4),
    # the same; the second tree keeps the width, and pools
    Timm("dla46_c", 12, 3),
    # Bottleneck 1, stages 4 + 6 + 8, head 4; the sums of the fusions are none
    Timm("hrnet_w18_small", 23, 5),
    Timm("convmixer_768_32", 32),
    # concatenation is no residual
    Timm("densenet121", 0),
    Timm("vgg11", 0),
    Timm("inception_v3", 0, side=96),
    Timm("selecsls42", 0),
)

TRANSFORMERS_OF_TIMM = (
    Timm("vit_tiny_patch16_224", 6, config=_VIT),
    # two attentions, then two MLPs, side by side
    Timm("vit_small_patch16_18x2_224", 6, config=_VIT),
    Timm("deit_tiny_distilled_patch16_224", 6, config=_VIT),
    Timm("beit_base_patch16_224", 6, config={**_VIT, "embed_dim": 48, "num_heads": 4}),
    Timm("eva02_tiny_patch14_224", 6, config=_VIT),
    # three blocks and two of class attention
    Timm("cait_xxs24_224", 10, config=_VIT),
    # attention, local patch interaction and MLP; two blocks of class attention
    Timm("xcit_nano_12_p16_224", 13, config={"img_size": 64, "depth": 3}),
    # depths 2, 2, 6, 2
    Timm("swin_tiny_patch4_window7_224", 24, config={"img_size": 224}, side=224),
    # one MBConv, one window and one grid attention in each of four stages; one shortcut is pooled
    Timm("test_maxvit", 20, 3, side=160),
    # 18 blocks and two downsampling MLPs
    Timm("levit_128s", 20, side=224),
    # position convolution, attention and MLP in 2 x 4 blocks
    Timm("coat_lite_tiny", 24, config={"img_size": 64}),
    # blocks of 2 each in both branches, and 2 fusions, in 3 stages: 3 x (2 + 6 + 2)
    Timm("crossvit_9_240", 30, side=240),
    # depths 2, 2, 6, 2: the last of three stages has channel attention and an MLP
    Timm("edgenext_xx_small", 15),
    # inverted residuals 1 + 2, transformers of 2, 4 and 3
    Timm("mobilevit_xxs", 21),
    Timm("mixer_s32_224", 16, side=224),
    Timm("gmlp_ti16_224", 30, side=224),
    Timm("poolformer_s12", 24),
    # 10 RepMixer blocks of two; and 14 reparametrisable convolutions with a BatchNorm beside them
    Timm("fastvit_t8", 34, 14),
    # two convolutions and one attention block, two shortcuts each, and one in the stem
    Timm("efficientvit_b0", 11),
    # 18 blocks and 4 position convolutions
    Timm("twins_svt_small", 40, config={"img_size": 64}),
    # each layer has a spatial and a channel block of 4: depths 1, 1, 3, 1
    Timm("davit_tiny", 48),
    # 12 blocks; three stages begin with a projection
    Timm("hiera_tiny_224", 24, 3, side=224),
    # the residual pooling inside its attention is none; 10 blocks, three of them change the width
    Timm("mvitv2_tiny", 20, 3, side=224),
)


@dataclass(frozen=True)
class Layers:
    """A model of ``tests.zoo`` or ``tests.coverage``.

    Attributes:
        name: Its name there.
        per_layer: Path of a list of layers → residual additions in each of them.
        extra: Those elsewhere; less than 0 where a last layer has fewer.
    """

    name: str
    per_layer: dict[str, int]
    extra: int = 0


DECODERS = (
    Layers("llama", {"model.layers": 2}),
    Layers("qwen3", {"model.layers": 2}),
    Layers("mixtral", {"model.layers": 2}),
    Layers("qwen3_moe", {"model.layers": 2}),
    # norms before and after
    Layers("gemma3_text", {"model.layers": 2}),
    Layers("Gemma2ForCausalLM", {"model.layers": 2}),
    Layers("gpt2", {"transformer.h": 2}),
    # attention and MLP side by side
    Layers("PhiForCausalLM", {"model.layers": 1}),
    Layers("CohereForCausalLM", {"model.layers": 1}),
    Layers("FalconForCausalLM", {"transformer.h": 1}),
    Layers("GPTNeoXForCausalLM", {"gpt_neox.layers": 1}),
    Layers("GPTJForCausalLM", {"transformer.h": 1}),
    Layers("OPTForCausalLM", {"model.decoder.layers": 2}),
    # added in a function, dropout and all
    Layers("BloomForCausalLM", {"transformer.h": 2}),
    Layers("MptForCausalLM", {"transformer.blocks": 2}),
    # the skip of the state space inside the mixer is none
    Layers("MambaForCausalLM", {"backbone.layers": 1}),
)

ENCODERS = (
    Layers("bert", {"encoder.layer": 2}),
    Layers("deberta-v2", {"encoder.layer": 2}),
    Layers("RobertaModel", {"encoder.layer": 2}),
    Layers("ElectraModel", {"encoder.layer": 2}),
    # one layer, used three times
    Layers("AlbertModel", {"encoder.albert_layer_groups": 6}),
    Layers("DistilBertModel", {"transformer.layer": 2}),
    Layers("XLNetModel", {"layer": 2}),
    Layers("t5", {"encoder.block": 2, "decoder.block": 3}),
    Layers("BartForConditionalGeneration", {"model.encoder.layers": 2, "model.decoder.layers": 3}),
    Layers("whisper", {"model.encoder.layers": 2, "model.decoder.layers": 3}),
    Layers("vit", {"layers": 2}),
    Layers("CLIPModel", {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 2}),
    # the pooling head has an MLP with a shortcut
    Layers("SiglipModel", {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 2}, 1),
    # a position convolution is added to the features
    Layers("Wav2Vec2ForCTC", {"wav2vec2.encoder.layers": 2}, 1),
)

DIFFUSERS = (
    Layers("DiTTransformer2DModel", {"transformer_blocks": 2}),
    Layers("PixArtTransformer2DModel", {"transformer_blocks": 3}),
    # two streams; the last block drops the context
    Layers("SD3Transformer2DModel", {"transformer_blocks": 4}, -2),
    Layers("FluxTransformer2DModel", {"transformer_blocks": 4, "single_transformer_blocks": 1}),
    # down: 2 x (resnet, transformer, its 3), 2 resnets; middle: 2 resnets and a transformer;
    # up: 3 resnets, 3 x (resnet, transformer, its 3)
    Layers("UNet2DConditionModel", {}, 10 + 2 + 6 + 3 + 15),
    # down 2, middle 3; middle 3, up 4
    Layers("AutoencoderKL", {}, 12),
    Layers("SanaTransformer2DModel", {"transformer_blocks": 3}),
    # a skip is concatenated, not added
    Layers("HunyuanDiT2DModel", {"blocks": 3}),
    Layers("LTXVideoTransformer3DModel", {"transformer_blocks": 3}),
    Layers("WanTransformer3DModel", {"blocks": 3}),
    Layers("CogVideoXTransformer3DModel", {"transformer_blocks": 4}),
    Layers("MochiTransformer3DModel", {"transformer_blocks": 4}, -2),
    # the first shortcut of a block goes into the norm, the second around all of it
    Layers(
        "AuraFlowTransformer2DModel",
        {"joint_transformer_blocks": 4, "single_transformer_blocks": 2},
    ),
    # the last block computes a context that the model does not use
    Layers("QwenImageTransformer2DModel", {"transformer_blocks": 4}),
)
