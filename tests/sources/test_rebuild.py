"""Descriptions: complete, plain JSON, and resolved to nothing but model classes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import SourceError, load
from surgery.sources import describe, rebuild, why_undescribed
from tests import zoo

# timm keeps no record of the arguments of the two that are not made by create_model.
UNDESCRIBED = ["timm_poolformer", "timm_caformer"]
DESCRIBED = [name for name in zoo.names() if name not in UNDESCRIBED]


def described(model: nn.Module) -> dict[str, Any]:
    description = describe(model)
    assert description is not None
    return json.loads(json.dumps(description))


def hidden_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that no state dict holds."""
    state = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in state}


@pytest.mark.filterwarnings("ignore:There are modules in")  # diffusers, on any cast of dtype
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", DESCRIBED)
def test_rebuilds_everything_but_the_weights(name: str, dtype: torch.dtype) -> None:
    model, example = zoo.build(name)
    model = model.to(dtype)
    random_state = torch.random.get_rng_state()
    again = rebuild(described(model))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert type(again) is type(model)
    expected = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in again.state_dict().items()} == expected
    hidden, rebuilt = hidden_buffers(model), hidden_buffers(again)
    assert hidden.keys() == rebuilt.keys()
    assert all(torch.equal(hidden[key], rebuilt[key]) for key in hidden)
    again.load_state_dict(model.state_dict())
    call = example.to(dtype=dtype)
    with torch.no_grad():
        ours: Any = again.eval()(*call.args, **call.kwargs)
        theirs: Any = model(*call.args, **call.kwargs)
    # The same kernels on the same values: equal to the last bit.
    assert torch.equal(tensor(ours), tensor(theirs))


def tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_rotary_frequencies_are_rebuilt() -> None:
    """The test above proves nothing about hidden buffers unless some model has them."""
    for name in ("llama", "gemma3_text"):
        buffers = hidden_buffers(rebuild(described(zoo.build(name)[0])))
        assert any("inv_freq" in key and bool(value.any()) for key, value in buffers.items())


@pytest.mark.parametrize("name", ["llama", "UNet2DConditionModel", "timm_vit"])
def test_on_meta(name: str) -> None:
    model, _ = zoo.build(name)
    again = rebuild(described(model), device="meta")
    assert all(parameter.is_meta for parameter in again.parameters())
    assert describe(again) is not None


def test_parts_in_other_dtypes_are_kept() -> None:
    model, _ = zoo.build("bert")
    mixed: Any = model.to(torch.bfloat16)
    mixed.pooler.float()
    again: Any = rebuild(described(mixed))
    assert again.pooler.dense.weight.dtype == torch.float32
    assert again.embeddings.word_embeddings.weight.dtype == torch.bfloat16


def test_config_overrides_and_source_survive() -> None:
    config = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4, "global_pool": "avg"}
    model = load("timm:vit_tiny_patch16_224", config=config)
    description = described(model)
    again: Any = rebuild(description)
    assert again.global_pool == "avg"
    assert description["source"]["spec"] == "timm:vit_tiny_patch16_224"
    assert described(again) == description


def test_a_part_of_a_model_that_is_a_model_itself() -> None:
    model: Any = zoo.build("t5")[0]
    again = rebuild(described(model.encoder))
    assert type(again) is type(model.encoder)
    assert again.state_dict().keys() == model.encoder.state_dict().keys()


def test_resized_embeddings() -> None:
    model: Any = zoo.build("bert")[0]
    model.resize_token_embeddings(77, mean_resizing=False)
    words: Any = rebuild(described(model)).get_submodule("embeddings.word_embeddings")
    assert words.weight.shape[0] == 77


class OwnBert(nn.Linear):
    pass


def undescribable() -> list[tuple[nn.Module, str]]:
    timm_model: Any = copy.deepcopy(zoo.build("timm_vit")[0])
    timm_model.head = nn.Linear(32, 3)
    return [
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear is a class of the user's own"),
        (OwnBert(2, 2), "OwnBert is a class of the user's own"),
        (
            zoo.build("llama")[0].get_submodule("model.layers.0"),
            "is a part of a transformers model",
        ),
        (zoo.build("timm_poolformer")[0], "timm.create_model did not make this model"),
        (timm_model, "other keys or shapes than the model that was described"),
    ]


def test_says_why_there_is_no_description() -> None:
    for model, reason in undescribable():
        assert describe(model) is None
        assert reason in str(why_undescribed(model))
    assert why_undescribed(zoo.build("bert")[0]) is None


HOSTILE: list[tuple[dict[str, object], str]] = [
    ({"class": "os.system"}, "refused to resolve 'os.system'"),
    ({"class": "tests.zoo.build"}, "refused to resolve"),
    ({"class": "transformers.pipelines.Pipeline"}, "refused to resolve"),
    ({"class": "transformers.models.bert.modeling_bert.nn"}, "is not a model class"),
    ({"class": "transformers.models.bert.modeling_bert.PreTrainedModel"}, "is not a model class"),
    ({"class": "transformers.models.bert.modeling_bert.NoSuch"}, "is not a model class"),
    ({"class": "transformers.models.nope.modeling_nope.Nope"}, "has no module"),
    ({"class": "transformers.models.gpt2.modeling_gpt2.GPT2Model"}, "which it does not take"),
    ({"library": "os"}, "names the library 'os'"),
    ({"library": "diffusers"}, "refused to resolve 'transformers.models"),
    ({"format": 99}, "has format 99, expected 1"),
    ({"config": []}, "'config' is \\[\\], expected dict"),
    ({"config": {"model_type": "nope"}}, "no model type 'nope'"),
    ({"config_class": "GPT2Config"}, "which it does not take"),
    ({"attention": "org/kernel"}, "would download code"),
    ({"dtypes": {"default": "load"}}, "names the dtype 'load'"),
    ({"dtypes": {"default": "int8"}}, "names the dtype 'int8'"),
    ({"state": {"keys": 1, "sha256": "0"}}, "other keys or shapes"),
]


@pytest.mark.parametrize(("changes", "message"), HOSTILE)
def test_hostile_or_stale_descriptions(changes: dict[str, object], message: str) -> None:
    description = described(zoo.build("bert")[0]) | changes
    with pytest.raises(SourceError, match=message):
        rebuild(description)


def test_a_field_that_lacks() -> None:
    description = described(zoo.build("bert")[0])
    for key in description:
        with pytest.raises(SourceError):
            rebuild({name: value for name, value in description.items() if name != key})


def test_hostile_weights_of_timm(tmp_path: Path) -> None:
    """A description that names a weight file does not make timm open it."""
    description = described(zoo.build("timm_vit")[0])
    description["pretrained_cfg"] |= {"file": str(tmp_path / "x.bin"), "source": "local-dir"}
    rebuild(description)
    description["config"] |= {"checkpoint_path": str(tmp_path / "x.bin")}
    with pytest.raises(SourceError, match="'checkpoint_path' is not the architecture's"):
        rebuild(description)


def test_no_parameter_is_drawn() -> None:
    """Drawing billions of numbers takes minutes, and a checkpoint replaces them anyway."""
    again = rebuild(described(zoo.build("llama")[0]))
    matrices = [parameter for parameter in again.parameters() if parameter.ndim == 2]
    assert matrices
    assert all(parameter.unique().numel() == 1 for parameter in matrices)
