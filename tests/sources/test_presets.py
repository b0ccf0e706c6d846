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


def called(model: nn.Module, example: surgery.Example) -> Tensor:
    output: Any = model(*example.args, **example.kwargs)
    return output if isinstance(output, Tensor) else output[0]


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
    _move(model)
    called(model, infer_example(model)).square().sum().backward()
    assert not [name for name, each in model.named_parameters() if each.grad is None]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", TINY)
def test_identity_start_changes_no_bit(name: str, training: bool, recipes: Path) -> None:
    model = load(f"preset:{name}").train(training)
    _move(model)
    example = infer_example(model)
    expected = same_randomness(copy.deepcopy(model), example)
    surgery.apply(model, str(recipes / "ancre-identity.yaml"))
    assert torch.equal(same_randomness(model, example), expected)


@pytest.mark.parametrize("name", TINY)
def test_saved_and_restored_with_its_rewrite(name: str, recipes: Path, tmp_path: Path) -> None:
    model = load(f"preset:{name}").eval()
    _move(model)
    surgery.apply(model, str(recipes / "ancre.yaml"))
    surgery.save(model, tmp_path / "saved")
    again = surgery.restore(tmp_path / "saved")
    example = infer_example(model)
    assert torch.equal(called(again, example), called(model, example))
    assert _count(again) == _count(model)
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


def test_dit_starts_as_in_its_paper() -> None:
    model: Any = load("preset:dit-tiny")
    example = infer_example(model)
    assert not called(model.eval(), example).any()
    x = torch.randn(2, 16, 128)
    for block in model.transformer_blocks:
        kwargs = {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([0, 9])}
        assert torch.equal(block(x, **kwargs), x)
    for name, each in model.named_parameters():
        zeroed = "norm1.linear" in name or name.startswith("proj_out") or name.endswith("bias")
        assert bool(each.any()) is not zeroed, name
    bound = (6 / (128 + 512)) ** 0.5  # of Xavier's uniform distribution
    largest = float(model.transformer_blocks[0].ff.net[0].proj.weight.detach().abs().max())
    assert 0.99 * bound < largest <= bound
    patches = float(model.pos_embed.proj.weight.detach().abs().max())
    assert 0.95 * (6 / (4 + 128)) ** 0.5 < patches <= (6 / (4 + 128)) ** 0.5


def test_the_stock_class_would_not_start_so() -> None:
    stock = load("diffusers:DiTTransformer2DModel", config=PRESETS["dit-tiny"].config).eval()
    assert called(stock, infer_example(stock)).any()
    # Seven more embedders of 256 d + d² + 2 d + 1001 d.
    more = 7 * (256 * 128 + 128**2 + 2 * 128 + 1001 * 128)
    assert _count(stock) == PRESETS["dit-tiny"].parameters + more


def test_dit_embedders_are_one_in_every_block() -> None:
    model: Any = load("preset:dit-tiny", dtype="bfloat16")
    first = model.transformer_blocks[0].norm1.emb
    assert all(block.norm1.emb is first for block in model.transformer_blocks)
    assert sum(".emb." in name for name in model.state_dict()) == 8 * 5


def test_dit_embedders_stay_one_when_it_is_rebuilt_or_restored(
    recipes: Path, tmp_path: Path
) -> None:
    model = load("preset:dit-tiny", config={"num_layers": 3})
    description: Any = describe(model)
    again: Any = rebuild(description)
    assert again.transformer_blocks[2].norm1.emb is again.transformer_blocks[0].norm1.emb
    assert _count(again) == _count(model)
    # An adapter inside the shared embedder, which has a path in every block.
    surgery.apply(model, str(recipes / "lora-all-linear.yaml"))
    surgery.save(model, tmp_path / "adapted")
    restored = surgery.restore(tmp_path / "adapted")
    assert _count(restored) == _count(model)


def test_dit_with_embedders_apart_again_is_written_by_diffusers(tmp_path: Path) -> None:
    model: Any = load("preset:dit-tiny", config={"num_layers": 3}).eval()
    _move(model)
    expected = called(model, infer_example(model))
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    model.save_pretrained(tmp_path / "stock")
    assert torch.equal(called(load(tmp_path / "stock").eval(), infer_example(model)), expected)
    surgery.save(model, tmp_path / "ours")
    assert _count(surgery.restore(tmp_path / "ours")) == _count(model)


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ({"transformer_blocks.1.nowhere": "transformer_blocks.0"}, "no attribute|nowhere"),
        ({"transformer_blocks.1": "pos_embed"}, "expected two modules of one class"),
        ([], "'shared' is"),
    ],
)
def test_a_description_that_shares_what_cannot_be(shared: Any, message: str) -> None:
    description = describe(load("preset:dit-tiny", device="meta"))
    assert description is not None
    assert set(description["shared"].values()) == {"transformer_blocks.0.norm1.emb"}
    with pytest.raises(SourceError, match=message):
        rebuild({**description, "shared": shared})


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
# What DPM-Solver of diffusers does with numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_dit_works_in_the_pipeline(guidance: float, name: str) -> None:
    import diffusers

    model = load("preset:dit-tiny").eval()
    _move(model)
    vae = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        sample_size=8,
    )
    pipeline = diffusers.DiTPipeline(
        transformer=model, vae=vae, scheduler=getattr(diffusers, name)(num_train_timesteps=1000)
    )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        [3, 9],
        guidance_scale=guidance,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (2, 1, 8, 8)
    assert images.isfinite().all()
    assert images.std() > 0


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


def _move(model: nn.Module) -> None:
    """Leave the start, where a DiT's blocks are the identity and comparisons would say nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.02 * torch.randn(each.shape, generator=generator))


def _count(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def test_the_page_runs_and_lists_what_there_is(root: Path) -> None:
    text = (root / "docs" / "backbones.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "docs/backbones.md", "exec"), {"__name__": "docs"})  # noqa: S102 -- our own page
    rows = re.findall(r"^\| `([\w-]+)` \| .*?`(\w+)` \| ([\d,]+) \|", text, re.MULTILINE)
    assert {name: (cls, int(count.replace(",", ""))) for name, cls, count in rows} == {
        name: (each.cls, each.parameters) for name, each in PRESETS.items()
    }
