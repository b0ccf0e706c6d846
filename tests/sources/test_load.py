"""Architectures by name: the library's own object, with checked overrides."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from surgery import SourceError, load
from surgery.sources import SOURCE_ATTRIBUTE

LLAMA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 24,
}
VIT: dict[str, Any] = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4}

# spec, overrides, the class, an attribute that shows an override
GOOD: list[tuple[str, dict[str, Any], str, str, object]] = [
    ("timm:vit_tiny_patch16_224", VIT, "VisionTransformer", "embed_dim", 32),
    ("timm:resnet18", {"num_classes": 3}, "ResNet", "num_classes", 3),
    ("transformers:llama", LLAMA, "LlamaModel", "config.hidden_size", 32),
    ("transformers:LlamaConfig", LLAMA, "LlamaModel", "config.vocab_size", 96),
    ("transformers:LlamaForCausalLM", LLAMA, "LlamaForCausalLM", "config.num_hidden_layers", 2),
    (
        "transformers:LlamaForSequenceClassification",
        LLAMA | {"num_labels": 5},
        "LlamaForSequenceClassification",
        "num_labels",
        5,
    ),
    (
        "transformers:LlamaForCausalLM",
        LLAMA | {"rope_theta": 500.0},
        "LlamaForCausalLM",
        "config.rope_parameters",
        {"rope_theta": 500.0, "rope_type": "default"},
    ),
    (
        "transformers:gpt2",  # an alias that the configuration class maps to n_layer
        {"num_hidden_layers": 1, "n_embd": 32, "n_head": 4, "vocab_size": 96},
        "GPT2Model",
        "config.n_layer",
        1,
    ),
    (
        "transformers:LlamaModel",
        LLAMA | {"attn_implementation": "eager"},
        "LlamaModel",
        "config._attn_implementation",
        "eager",
    ),
    (
        "transformers:deberta-v2",  # the model reads a field its configuration does not declare
        {"num_hidden_layers": 1, "vocab_size": 96, "relative_attention": True}
        | {"position_buckets": 8},
        "DebertaV2Model",
        "encoder.position_buckets",
        8,
    ),
    ("diffusers:UNet2DConditionModel", UNET, "UNet2DConditionModel", "config.norm_num_groups", 8),
]


@pytest.mark.parametrize(("spec", "config", "name", "path", "value"), GOOD)
def test_gives_the_librarys_own_object(
    spec: str, config: dict[str, Any], name: str, path: str, value: object
) -> None:
    model = load(spec, config=config)
    assert type(model).__name__ == name
    assert type(model).__module__.startswith(spec.partition(":")[0])
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert SOURCE_ATTRIBUTE not in model.state_dict()
    source = model.__dict__[SOURCE_ATTRIBUTE]
    assert (source["spec"], source["pretrained"]) == (spec, False)


def test_nested_overrides_keep_the_other_defaults() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 1}
    model = load("transformers:gemma3", config={"text_config": text}, device="meta")
    untouched = load("transformers:gemma3", device="meta")
    ours: Any = model.config
    stock: Any = untouched.config
    assert (ours.text_config.hidden_size, ours.text_config.num_hidden_layers) == (64, 1)
    assert ours.text_config.intermediate_size == stock.text_config.intermediate_size
    assert ours.vision_config.to_dict() == stock.vision_config.to_dict()


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("timm:vit_tiny_patch16_244", {}, "has no model.*did you mean 'vit_tiny_patch16_224'"),
    ("timm:resnet18.nothing", {}, "no weights 'resnet18.nothing'"),
    ("timm:vit_tiny_patch16_224", {"depht": 2}, "takes no 'depht'.*did you mean 'depth'"),
    ("timm:resnet18", {"pretrained_cfg": {}}, "'pretrained_cfg' is not the architecture's"),
    ("timm:resnet18", {"act_layer": torch.nn.GELU}, "config: act_layer is .*cannot be recorded"),
    ("timm:vit_tiny_patch16_224", {"num_heads": 7}, "timm could not build"),
    ("transformers:lama", {}, "no architecture 'lama'.*did you mean 'llama'"),
    ("transformers:LlamaForCausalML", {}, "did you mean 'LlamaForCausalLM'"),
    ("transformers:PreTrainedModel", {}, "no architecture 'PreTrainedModel'"),
    ("transformers:pipeline", {}, "no architecture 'pipeline'"),
    ("transformers:llama", {"num_hidden_layer": 2}, "did you mean 'num_hidden_layers'"),
    ("transformers:llama", {"temperature": 2}, "LlamaConfig has no field 'temperature'"),
    ("transformers:llama", {"full_attention": 2}, "LlamaConfig has no field 'full_attention'"),
    ("transformers:llama", {"hidden_size": "wide"}, "LlamaConfig refused its values"),
    ("transformers:llama", {"num_attention_heads": 7}, "LlamaConfig refused its values"),
    (
        "transformers:gemma3",
        {"text_config": {"hiden_size": 8}},
        "config.text_config: Gemma3TextConfig has no field 'hiden_size'.*'hidden_size'",
    ),
    (
        "transformers:llama",
        {"attn_implementation": "someone/kernel"},
        "would download code; it is never run",
    ),
    ("diffusers:UNet2DConditonModel", {}, "no model class.*did you mean 'UNet2DConditionModel'"),
    ("diffusers:DDPMScheduler", {}, "no model class 'DDPMScheduler'"),
    ("diffusers:UNet2DModel", {"sample_siz": 3}, "takes no 'sample_siz'.*did you mean 'sample_siz"),
    ("diffusers:UNet2DModel", {"down_block_types": ("No",)}, "could not build UNet2DModel"),
]


@pytest.mark.parametrize(("spec", "config", "message"), BAD)
def test_refuses_and_suggests(spec: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=f"(?s){message}"):
        load(spec, config=config, device="meta")


def test_architecture_without_weights() -> None:
    with pytest.raises(SourceError, match=r"(?s)ties no weights to it.*hub:ORG/NAME/SUBFOLDER"):
        load("diffusers:UNet2DModel", pretrained=True)
    with pytest.raises(SourceError, match=r"architecture; transformers ties no weights to it"):
        load("transformers:llama", pretrained=True)
    with pytest.raises(SourceError, match="no pretrained weights for 'vit_small_patch16_36x1_224'"):
        load("timm:vit_small_patch16_36x1_224", pretrained=True)


def test_unreachable_weights_of_timm() -> None:
    with pytest.raises(SourceError, match="could not fetch the weights of 'test_vit'"):
        load("timm:test_vit", pretrained=True)


@pytest.mark.parametrize("spec", ["timm:resnet18", "transformers:llama", "diffusers:UNet2DModel"])
def test_meta_allocates_nothing(spec: str) -> None:
    model = load(spec, device="meta", dtype="bfloat16")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(buffer.is_meta for buffer in model.buffers())


def test_llama_70b_on_meta_has_its_full_size() -> None:
    sizes = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
    model = load("transformers:LlamaForCausalLM", config=sizes, device="meta", dtype=torch.bfloat16)
    # Llama 2 70B: vocabulary 32000, untied.
    assert sum(parameter.numel() for parameter in model.parameters()) == 68_976_648_192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bf16"}, "dtype='bf16': expected a floating dtype.*did you mean 'bfloat16'"),
        ({"dtype": torch.int8}, "expected a floating dtype"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"device": "cuda:99"}, "CUDA devices are visible"),
    ],
)
def test_bad_device_or_dtype(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=f"(?s){message}"):
        load("timm:resnet18", **arguments)


@pytest.mark.parametrize("name", ["timm", "transformers", "diffusers"])
def test_missing_library_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.sources.libraries.installed", lambda _: False)
    with pytest.raises(SourceError, match=rf"(?s){name} is not installed.*model-surgery\[{name}\]"):
        load(f"{name}:anything")


def test_importing_sources_imports_no_library() -> None:
    code = (
        "import sys, surgery.sources\n"
        "heavy = {'timm', 'transformers', 'diffusers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
