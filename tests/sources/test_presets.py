"""``preset:NAME``: the library's own class, the paper's size and initialisation, and its record."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from architectures.backbones import PRESETS, preset
from surgery import SourceError, load
from surgery.sources import describe, infer_example, rebuild, variants
from tests.sources.backbones import called, count, moved

TINY = ["llama-tiny", "dit-tiny", "resnet-20-cifar", "mlp-8"]
CLASSES = {
    "llama-tiny": "transformers.models.llama.modeling_llama.LlamaForCausalLM",
    "dit-tiny": "diffusers.models.transformers.dit_transformer_2d.DiTTransformer2DModel",
    "resnet-18": "timm.models.resnet.ResNet",
    "resnet-20-cifar": "architectures.backbones.resnet.CifarResNet",
    "mlp-8": "architectures.backbones.mlp.ResidualMLP",
}
# (name, override) → the number of parameters, by the formulas in docs/backbones.md.
OVERRIDES = {
    "llama-tiny": ({"vocab_size": 512, "num_hidden_layers": 16}, 6_101_184),
    "llama-60m": ({"tie_word_embeddings": True}, 58_073_600 - 32000 * 512),
    "dit-tiny": ({"num_embeds_ada_norm": 10}, 2_586_372 - 990 * 128),
    "resnet-18": ({"num_classes": 10}, 11_689_512 - 990 * 513),
    "resnet-20-cifar": ({"in_chans": 1}, 269_722 - 2 * 9 * 16),
    "mlp-8": ({"width": 32}, 8 * (32 * 32 + 3 * 32) + 65 * 32 + 2 * 32 + 33 * 10),
}
BAD = {
    "preset:lama-60m": ({}, "there is no preset 'lama-60m'", "preset:llama-60m"),
    "preset:gpt": ({}, "there is no preset", "known: llama-tiny, .*mlp-DEPTH"),
    "preset:resnet-18-cifar": ({}, "nearest is 14 or 20", "preset:resnet-20-cifar"),
    "preset:llama-tiny": ({"config": {"hiden_size": 8}}, "no field 'hiden_size'", "hidden_size"),
    "preset:resnet-18": ({"config": {"clases": 8}}, "takes no 'clases'", ""),
    "preset:mlp-8": ({"config": {"widht": 8}}, "takes no 'widht'", "width"),
    "preset:mlp-9": ({"config": {"layers_per_block": 2}}, "nearest are 8 and 10", ""),
    "preset:dit-tiny": ({"pretrained": True}, "no weights belong to it", "pretrained=False"),
}


def same_randomness(model: nn.Module, example: surgery.Example) -> Tensor:
    torch.manual_seed(1)  # diffusers drops labels at random where it trains
    return called(model, example)


@pytest.fixture(scope="module")
def recipes(request: pytest.FixtureRequest) -> Path:
    return request.config.rootpath / "configs" / "rules"


@pytest.mark.parametrize("name", PRESETS)
def test_builds_on_meta_with_the_count_of_the_paper(name: str) -> None:
    model = load(f"preset:{name}", device="meta")
    assert {each.device.type for each in model.parameters()} == {"meta"}
    assert sum(each.numel() for each in model.parameters()) == PRESETS[name].parameters


@pytest.mark.parametrize("name", ["resnet-52-basic", "resnet-1202", "resnet-1001-cifar-bottleneck"])
def test_builds_any_depth(name: str) -> None:
    model = load(f"preset:{name}", device="meta")
    assert sum(each.numel() for each in model.parameters()) == preset(name).parameters


@pytest.mark.parametrize("name", CLASSES)
def test_is_the_librarys_own_class(name: str) -> None:
    model = load(f"preset:{name}")
    assert f"{type(model).__module__}.{type(model).__qualname__}" == CLASSES[name]


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_are_the_librarys(name: str) -> None:
    config, expected = OVERRIDES[name]
    model = load(f"preset:{name}", config=config, device="meta")
    assert sum(each.numel() for each in model.parameters()) == expected


@pytest.mark.parametrize("spec", BAD)
def test_refuses(spec: str) -> None:
    arguments, message, hint = BAD[spec]
    with pytest.raises(SourceError, match=message) as caught:
        load(spec, **arguments)
    assert re.search(hint, caught.value.hint or "")


@pytest.mark.parametrize("name", TINY)
def test_is_rebuilt_from_its_description(name: str) -> None:
    model = load(f"preset:{name}", dtype="bfloat16")
    description = describe(model)
    assert description is not None
    assert description["source"]["spec"] == f"preset:{name}"
    again = rebuild(description)
    assert type(again) is type(model)
    expected = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in again.state_dict().items()} == expected


@pytest.mark.parametrize("name", TINY)
def test_examples_are_inferred(name: str) -> None:
    model = load(f"preset:{name}").eval()
    example = infer_example(model)
    output = called(model, example)
    assert output.shape[0] == example.batch() == 2
    assert output.isfinite().all()
    for other in variants(example):
        assert called(model, other).isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_seeded_weights_are_the_same_and_differ_by_seed(name: str) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(load(f"preset:{name}").parameters()).detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("name", TINY)
def test_ancre_rewires_every_family(name: str, recipes: Path) -> None:
    model = load(f"preset:{name}")
    surgery.apply(model, str(recipes / "ancre.yaml"))
    matrices = surgery.shortcuts(model)
    assert sum(len(matrix) for matrix in matrices.values()) >= 7
    moved(model)
    called(model, infer_example(model)).square().sum().backward()
    assert not [name for name, each in model.named_parameters() if each.grad is None]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", TINY)
def test_identity_start_changes_no_bit(name: str, training: bool, recipes: Path) -> None:
    model = load(f"preset:{name}").train(training)
    moved(model)
    example = infer_example(model)
    expected = same_randomness(copy.deepcopy(model), example)
    surgery.apply(model, str(recipes / "ancre-identity.yaml"))
    assert torch.equal(same_randomness(model, example), expected)


@pytest.mark.parametrize("name", TINY)
def test_saved_and_restored_with_its_rewrite(name: str, recipes: Path, tmp_path: Path) -> None:
    model = load(f"preset:{name}").eval()
    moved(model)
    surgery.apply(model, str(recipes / "ancre.yaml"))
    surgery.save(model, tmp_path / "saved")
    again = surgery.restore(tmp_path / "saved")
    example = infer_example(model)
    assert torch.equal(called(again, example), called(model, example))
    assert count(again) == count(model)
    surgery.undo(again)
    assert type(again) is type(load(f"preset:{name}", device="meta"))


def test_llama_starts_as_its_configuration_says() -> None:
    model = load("preset:llama-tiny")
    for name, each in model.named_parameters():
        if each.dim() == 1:
            assert bool((each == 1).all()), name
        else:
            # 36 864 draws or more: the deviation of their deviation is below 0.4 %, five of it 2 %.
            assert float(each.detach().std()) == pytest.approx(0.02, rel=0.02), name
            assert not bool((each == 0).all(dim=1).any()), name


@pytest.mark.parametrize("name", ["resnet-18", "resnet-26-bottleneck"])
def test_timm_resnet_starts_as_in_2015(name: str) -> None:
    def last_norms(model: Any) -> Iterator[Tensor]:
        for path, module in model.named_modules():
            if path.endswith("bn2" if name == "resnet-18" else "bn3"):
                yield module.weight

    assert all(bool((weight == 1).all()) for weight in last_norms(load(f"preset:{name}")))
    zeroed = load(f"preset:{name}", config={"zero_init_last": True})
    found = list(last_norms(zeroed))
    assert found
    assert not any(weight.any() for weight in found)


def test_any_other_source_goes_the_same_way(recipes: Path) -> None:
    """Nothing in pretraining is special to presets: a timm ViT and a Qwen3 configuration."""
    for spec, config in {
        "timm:vit_tiny_patch16_224": {"depth": 3, "img_size": 32, "num_classes": 10},
        "transformers:Qwen3ForCausalLM": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 264,
        },
    }.items():
        model = load(spec, config=config)
        surgery.apply(model, str(recipes / "ancre.yaml"))
        called(model, infer_example(model)).square().sum().backward()
        assert all(each.grad is not None for each in model.parameters())


def test_the_page_runs_and_lists_what_there_is(root: Path) -> None:
    text = (root / "docs" / "backbones.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "docs/backbones.md", "exec"), {"__name__": "docs"})  # noqa: S102 -- our own page
    rows = re.findall(r"^\| `([\w-]+)` \| .*?`(\w+)` \| ([\d,]+) \|", text, re.MULTILINE)
    assert {name: (cls, int(count.replace(",", ""))) for name, cls, count in rows} == {
        name: (each.cls, each.parameters) for name, each in PRESETS.items()
    }
