"""Adapters between our models and pipelines of diffusers, in both directions."""

from __future__ import annotations

import copy
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery import LowRank, Path, Role, Rule, Type
from surgery.errors import CheckpointError, ExportError
from tests import zoo
from tests.interchange.peers import CLOSE, apart, stir, stirred

pytestmark = [
    # torchao and diffusers announce changes of other libraries while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

UNET, SD3, FLUX = "UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"
FILE = "pytorch_lora_weights.safetensors"


def pipeline(model: Any) -> Any:
    """A pipeline of diffusers around one tiny component."""
    import diffusers

    if isinstance(model, diffusers.UNet2DConditionModel):
        return diffusers.StableDiffusionPipeline(
            unet=model,
            scheduler=diffusers.DDIMScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return diffusers.StableDiffusion3Pipeline(
        transformer=model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def component(pipe: Any) -> Any:
    return pipe.components.get("unet", pipe.components.get("transformer"))


def peers(name: str, **config: Any) -> tuple[Any, Any, Any]:
    """A component with a random adapter of diffusers, its example, and the stock component."""
    from peft import LoraConfig

    model, example = zoo.build(name)
    stock = copy.deepcopy(model)
    model.add_adapter(LoraConfig(**config))
    stir((n, p) for n, p in model.named_parameters() if "lora_" in n)
    return model.eval(), example, stock


# --- Ours to theirs ------------------------------------------------------------------------------

RULES: dict[str, tuple[str, list[Rule]]] = {
    "unet": (
        UNET,
        [
            Rule(LowRank(rank=2, alpha=3), where=Role("attention.qkv")),
            Rule(LowRank(rank=3, alpha=4), where=Path("**.conv1")),
        ],
    ),
    "unet with dora": (UNET, [Rule(LowRank(method="dora", rank=2), where=Role("attention.out"))]),
    "unet with pissa": (UNET, [Rule(LowRank(method="pissa", rank=2), where=Path("**.to_v"))]),
    "sd3": (SD3, [Rule(LowRank(rank=2, alpha=3, scaling="rslora"), where=Type("Linear"))]),
}


@pytest.mark.parametrize("case", RULES)
def test_a_pipeline_loads_it(case: str, tmp_path: FilePath) -> None:
    name, rules = RULES[case]
    model, example = zoo.build(name)
    stock = copy.deepcopy(model)
    surgery.apply(model, rules, example=example)
    stirred(model)
    surgery.export(model, tmp_path, format="diffusers_lora", example=example)
    assert apart(stock, model, example) > 1e-3
    pipe = pipeline(copy.deepcopy(stock))
    pipe.load_lora_weights(str(tmp_path), adapter_name="ours")
    assert pipe.get_list_adapters() == {"unet" if name == UNET else "transformer": ["ours"]}
    assert apart(model, component(pipe).eval(), example) < CLOSE
    assert apart(model, surgery.load_adapter(stock, tmp_path), example) < CLOSE


def test_a_component_of_another_name(tmp_path: FilePath) -> None:
    model, example = zoo.build(SD3)
    stock = copy.deepcopy(model)
    surgery.apply(model, Rule(LowRank(rank=1), where=Path("**.to_q")))
    stirred(model)
    options: dict[str, Any] = {"format": "diffusers_lora", "prefix": "prior"}
    surgery.export(model, tmp_path, example=example, **options)
    assert all(name.startswith("prior.") for name in load_file(tmp_path / FILE))
    assert apart(model, surgery.load_adapter(stock, tmp_path), example) < CLOSE


def test_what_the_file_cannot_hold_is_refused(tmp_path: FilePath) -> None:
    model, example = zoo.build(SD3)
    surgery.apply(model, Rule(LowRank(rank=1), where=Path("**.to_q")))
    model.norm_out.linear.bias.requires_grad_(True)
    with pytest.raises(ExportError, match="no stock weights that were trained along"):
        surgery.export(model, tmp_path, format="diffusers_lora", example=example)
    surgery.undo(model)
    surgery.apply(model, Rule(LowRank(rank=1), where=Path("**.to_q")))
    model.transformer_blocks[0].attn.to_q.bias.requires_grad_(True)
    with pytest.raises(ExportError, match="biases were trained along"):
        surgery.export(model, tmp_path, format="diffusers_lora", example=example)
    bert, example = zoo.build("bert")
    surgery.apply(bert, Rule(LowRank(rank=1), where=Path("**.query")))
    with pytest.raises(ExportError, match="not one of diffusers"):
        surgery.export(bert, tmp_path, format="diffusers_lora", example=example)
    assert not list(tmp_path.iterdir())


# --- Theirs to ours ------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": (
        UNET,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["to_q", "conv1", "to_out.0"],
            "rank_pattern": {"conv1": 2},
            "alpha_pattern": {"to_q": 3},
        },
    ),
    "unet with dora": (UNET, {"r": 2, "use_dora": True, "target_modules": ["to_k"]}),
    "sd3": (SD3, {"r": 2, "lora_alpha": 5, "target_modules": ["to_q", "add_q_proj"]}),
}


def written(model: Any, folder: FilePath, *, metadata: bool) -> None:
    """Let the pipeline's class save the adapter of its component."""
    from peft import get_peft_model_state_dict

    name = "unet" if type(model).__name__ == UNET else "transformer"
    told = {k: list(v) if isinstance(v, set) else v for k, v in adapter_config(model).items()}
    pipeline(model).save_lora_weights(
        str(folder),
        **{f"{name}_lora_layers": get_peft_model_state_dict(model)},
        **({f"{name}_lora_adapter_metadata": told} if metadata else {}),
    )


def adapter_config(model: Any) -> dict[str, Any]:
    return model.peft_config["default"].to_dict()


@pytest.mark.parametrize("case", CONFIGS)
def test_what_a_pipeline_saved(case: str, tmp_path: FilePath) -> None:
    name, config = CONFIGS[case]
    theirs, example, stock = peers(name, **config)
    written(theirs, tmp_path, metadata=True)
    assert apart(theirs, stock, example) > 1e-3
    assert apart(theirs, surgery.load_adapter(stock, tmp_path), example) < CLOSE


def test_without_a_configuration_alpha_is_the_rank(tmp_path: FilePath) -> None:
    theirs, example, stock = peers(UNET, r=4, lora_alpha=6, target_modules=["to_q", "conv1"])
    written(theirs, tmp_path, metadata=False)
    pipe = pipeline(copy.deepcopy(stock))
    pipe.load_lora_weights(str(tmp_path))
    assert apart(theirs, pipe.unet.eval(), example) > 1e-3
    assert apart(pipe.unet, surgery.load_adapter(stock, tmp_path), example) < CLOSE


def test_a_component_that_saved_itself(tmp_path: FilePath) -> None:
    theirs, example, stock = peers(SD3, r=2, lora_alpha=5, target_modules=["to_q"])
    theirs.save_lora_adapter(str(tmp_path))
    loaded = surgery.load_adapter(stock, tmp_path / FILE)
    assert apart(theirs, loaded, example) < CLOSE


def test_names_of_before_peft(tmp_path: FilePath) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    theirs, example, stock = peers(UNET, r=4, target_modules=["to_q", "to_v"])
    old = convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs))
    tensors = {f"unet.{name}": tensor.contiguous() for name, tensor in old.items()}
    assert any(name.endswith(".down.weight") for name in tensors)
    save_file(tensors, tmp_path / FILE)
    pipe = pipeline(copy.deepcopy(stock))
    pipe.load_lora_weights(str(tmp_path))
    assert apart(pipe.unet.eval(), surgery.load_adapter(stock, tmp_path), example) < CLOSE


def test_alphas_as_tensors(tmp_path: FilePath) -> None:
    from diffusers import FluxPipeline
    from peft import get_peft_model_state_dict

    theirs, example, stock = peers(FLUX, r=4, target_modules=["to_q"])
    tensors = {
        f"transformer.{name}": tensor.contiguous()
        for name, tensor in get_peft_model_state_dict(theirs).items()
    }
    layers = sorted({name.partition(".lora_")[0] for name in tensors})
    tensors |= {f"{layer}.alpha": torch.tensor(1.0 + i) for i, layer in enumerate(layers)}
    save_file(tensors, tmp_path / FILE)
    state, alphas = FluxPipeline.lora_state_dict(str(tmp_path), return_alphas=True)
    other = copy.deepcopy(stock)
    FluxPipeline.load_lora_into_transformer(state, alphas, other)
    assert apart(other.eval(), surgery.load_adapter(stock, tmp_path), example) < CLOSE


def test_of_a_pipelines_file_the_part_of_the_model_is_read(tmp_path: FilePath) -> None:
    theirs, example, stock = peers(UNET, r=4, target_modules=["to_q"])
    written(theirs, tmp_path, metadata=True)
    from safetensors import safe_open

    with safe_open(tmp_path / FILE, "pt") as file:
        told = file.metadata()
    tensors = load_file(tmp_path / FILE)
    others = {
        f"text_encoder.text_model.q_proj.lora_{which}.weight": torch.ones(2, 2) for which in "AB"
    }
    save_file({**others, **tensors}, tmp_path / FILE, metadata=told)
    model = copy.deepcopy(stock)
    assert apart(theirs, surgery.load_adapter(model, tmp_path), example) < CLOSE
    assert apart(theirs, surgery.load_adapter(stock, tmp_path, prefix="unet"), example) < CLOSE
    with pytest.raises(CheckpointError, match="holds nothing under 'vae'"):
        surgery.load_adapter(zoo.build(UNET)[0], tmp_path, prefix="vae")


def test_a_file_for_another_model_names_the_layers(tmp_path: FilePath) -> None:
    theirs, _, _ = peers(UNET, r=2, target_modules=["to_q"])
    written(theirs, tmp_path, metadata=True)
    model, _ = zoo.build(SD3)
    before = list(model.state_dict())
    with pytest.raises(CheckpointError, match=r"belongs to another model.*down_blocks"):
        surgery.load_adapter(model, tmp_path)
    assert list(model.state_dict()) == before


def test_files_of_other_tools_are_refused_with_the_way_out(tmp_path: FilePath) -> None:
    model, _ = zoo.build(UNET)
    names = ("down.weight", "up.weight", "alpha")
    tensors = {f"lora_unet_mid_block_to_q.lora_{name}": torch.ones(1, 2) for name in names}
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="are of kohya"):
        surgery.load_adapter(model, tmp_path)
    (tmp_path / "lora.ckpt").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        surgery.load_adapter(model, tmp_path / "lora.ckpt")


def test_a_header_that_is_wrong(tmp_path: FilePath) -> None:
    theirs, _, stock = peers(SD3, r=2, target_modules=["to_q"])
    written(theirs, tmp_path, metadata=True)
    tensors = load_file(tmp_path / FILE)
    for text, said in (
        ("{", "not valid JSON"),
        ("[]", "is no JSON object"),
        ('{"transformer.lora_alpha": "x"}', "lora_alpha"),
        ('{"transformer.use_qalora": true}', "use_qalora"),
    ):
        save_file(tensors, tmp_path / FILE, metadata={"lora_adapter_metadata": text})
        with pytest.raises(CheckpointError, match=said):
            surgery.load_adapter(stock, tmp_path)
