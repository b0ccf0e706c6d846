"""Adapters of ours as folders of PEFT: what PEFT loads beside the stock model computes the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery import LowRank, Path, Role, Rule, Type, adapters
from surgery.errors import ExportError
from surgery.exporting import fits, provenance
from surgery.registry import ADAPTERS
from tests import zoo
from tests.interchange.peers import CLOSE, apart, by_peft, stirred

pytestmark = [
    # torchao and PEFT announce changes of other libraries while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Conv1D beside nn.Linear, and a head beside its embedding: both are meant here.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning"),
]

QKV = Role("attention.qkv")
# Model, rules, and what the configuration says.
CASES: dict[str, tuple[str, list[Rule], dict[str, Any]]] = {
    "llama": (
        "llama",
        [Rule(LowRank(rank=4, alpha=6), where=QKV)],
        {"r": 4, "lora_alpha": 6, "target_modules": ["k_proj", "q_proj", "v_proj"]},
    ),
    "rslora, ranks of their own": (
        "llama",
        [
            Rule(LowRank(rank=4, alpha=6, scaling="rslora", dropout=0.1), where=QKV),
            Rule(LowRank(rank=2, scaling="rslora", dropout=0.1), where=Path("**.down_proj")),
        ],
        {
            "use_rslora": True,
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"down_proj": 2},
            "lora_dropout": 0.1,
        },
    ),
    "rslora in some layers": (
        "llama",
        [
            Rule(LowRank(rank=4, scaling="rslora"), where=Path("**.q_proj")),
            Rule(LowRank(rank=4), where=Path("**.v_proj")),
        ],
        {"use_rslora": False, "lora_alpha": 8, "alpha_pattern": {"v_proj": 4}},
    ),
    "some layers": (
        "llama",
        [Rule(LowRank(rank=2), where=Path("model.layers.1.self_attn.q_proj"))],
        {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    ),
    "a tied embedding and Conv1D": (
        "gpt2",
        [Rule(LowRank(rank=2), where=Path("**.wte", "**.c_attn"))],
        {"target_modules": ["c_attn", "lm_head", "wte"]},
    ),
    "slices of a fused weight": (
        "gpt2",
        [Rule(LowRank(rank=2, alpha=3, slices=("q", "v")), where=QKV)],
        {"r": 4, "lora_alpha": 6, "fan_in_fan_out": True},
    ),
    "slices with dora": (
        "gpt2",
        [Rule(LowRank(method="dora", rank=2, slices=("q", "v")), where=QKV)],
        {"use_dora": True},
    ),
    "everything in a mixture of experts": (
        "qwen3_moe",
        [Rule(LowRank(rank=2))],
        {"target_parameters": ["down_proj", "gate.weight", "gate_up_proj"]},
    ),
    "mixtral": ("mixtral", [Rule(LowRank(rank=2))], {"r": 2}),
    "bert": ("bert", [Rule(LowRank(rank=2))], {"r": 2}),
    "vit": ("vit", [Rule(LowRank(rank=2), where=Type("Linear", "Conv2d"))], {"r": 2}),
    "unet": (
        "UNet2DConditionModel",
        [Rule(LowRank(rank=2), where=Path("down_blocks.**", "conv_in", "time_embedding.**"))],
        {"r": 2},
    ),
    "convolutions with dora": (
        "UNet2DConditionModel",
        [Rule(LowRank(method="dora", rank=2), where=Path("down_blocks.**"))],
        {"use_dora": True},
    ),
    "sd3": ("SD3Transformer2DModel", [Rule(LowRank(rank=2), where=QKV)], {"r": 2}),
}
METHODS = [name for name in ADAPTERS.names() if name != "scalora"]


def adapted(name: str, rules: list[Rule], seed: int = 0) -> tuple[Any, Any, Any]:
    """A model with random adapters, its example, and the stock model."""
    model, example = zoo.build(name)
    stock = copy.deepcopy(model)
    surgery.apply(model, rules, example=example)
    return stirred(model, seed=seed), example, stock


def config(folder: FilePath) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same(case: str, tmp_path: FilePath) -> None:
    name, rules, said = CASES[case]
    model, example, stock = adapted(name, rules)
    done = surgery.export(model, tmp_path, format="peft", example=example)
    assert set(done.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert {key: config(tmp_path)[key] for key in said} == said
    assert apart(stock, model, example) > 1e-3
    assert apart(model, by_peft(stock, tmp_path), example) < CLOSE
    again = surgery.load_adapter(stock, tmp_path)
    assert apart(model, again, example) < CLOSE


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_down_to_factors(method: str, tmp_path: FilePath) -> None:
    rule = Rule(LowRank(method=method, rank=2, alpha=3), where=Path("**.q_proj", "**.down_proj"))
    model, example, stock = adapted("llama", [rule])
    surgery.export(model, tmp_path, format="peft", example=example)
    assert apart(stock, model, example) > 1e-3
    assert apart(model, by_peft(stock, tmp_path), example) < CLOSE
    edit = model._surgery_record.edits[0]
    splits = any(name.endswith("initial_A") for name in edit.adds)
    assert config(tmp_path)["r"] == (4 if splits else 2)


def test_a_reinitialised_adapter_is_written_beside_the_original_weight(tmp_path: FilePath) -> None:
    made = LowRank(method="reflora", rank=2, alpha=3, options={"re_init": True})
    model, example, stock = adapted("llama", [Rule(made, where=Path("**.q_proj"))])
    surgery.export(model, tmp_path, format="peft", example=example)
    told = config(tmp_path)
    assert (told["r"], told["lora_alpha"]) == (4, 6)
    assert apart(model, by_peft(stock, tmp_path), example) < CLOSE


def test_an_adapter_that_added_to_its_weight_is_refused(tmp_path: FilePath) -> None:
    model, example, _ = adapted("llama", [Rule(LowRank(method="scalora", rank=2), where=QKV)])
    with pytest.raises(ExportError, match="of full rank; format='merged'"):
        surgery.export(model, tmp_path, format="peft", example=example)
    assert not list(tmp_path.iterdir())


def test_several_adapters_go_to_folders_of_their_own(tmp_path: FilePath) -> None:
    rules = [
        Rule(LowRank(rank=2, adapter="a"), where=QKV),
        Rule(LowRank(rank=3, adapter="b"), where=Path("**.o_proj", "**.q_proj")),
    ]
    model, example, stock = adapted("llama", rules)
    with pytest.raises(ExportError, match=r"'a', 'b'.*a file holds one"):
        surgery.export(model, tmp_path / "both", format="peft", example=example)
    with pytest.raises(ExportError, match="there is no adapter 'c'"):
        surgery.export(model, tmp_path / "c", format="peft", example=example, adapter="c")
    for name in ("a", "b"):
        surgery.export(model, tmp_path / name, format="peft", example=example, adapter=name)
        with adapters.using(model, name):
            assert apart(model, by_peft(stock, tmp_path / name), example) < CLOSE
    wrapped: Any = by_peft(stock, tmp_path / "a")
    wrapped.load_adapter(str(tmp_path / "b"), "b")
    wrapped.base_model.set_adapter(["default", "b"])
    assert apart(model, wrapped.eval(), example) < CLOSE


def test_the_share_of_the_active_adapter_is_written(tmp_path: FilePath) -> None:
    model, example, stock = adapted("llama", [Rule(LowRank(rank=2), where=QKV)])
    adapters.activate(model, {"default": 0.5})
    surgery.export(model, tmp_path / "half", format="peft", example=example)
    assert apart(model, by_peft(stock, tmp_path / "half"), example) < CLOSE
    surgery.export(model, tmp_path / "whole", format="peft", example=example, adapter="default")
    assert config(tmp_path / "whole")["lora_alpha"] == 2 * config(tmp_path / "half")["lora_alpha"]


def test_stock_weights_that_were_trained_along(tmp_path: FilePath) -> None:
    model, example, stock = adapted("bert", [Rule(LowRank(rank=2), where=Path("**.query"))])
    layer = model.encoder.layer[0].attention.self
    trained = {"pooler.dense": ["weight", "bias"], "encoder.layer.0.attention.self.query": ["bias"]}
    for path, names in trained.items():
        for name in names:
            parameter = model.get_submodule(path).get_parameter(name).requires_grad_(True)
            torch.nn.init.normal_(parameter, std=0.1)
    surgery.export(model, tmp_path, format="peft", example=example)
    told = config(tmp_path)
    assert (told["modules_to_save"], told["bias"]) == (["pooler.dense"], "lora_only")
    assert apart(model, by_peft(stock, tmp_path), example) < CLOSE
    assert apart(model, surgery.load_adapter(stock, tmp_path), example) < CLOSE
    assert stock.pooler.dense.weight.requires_grad

    layer.query.weight.requires_grad_(True)
    with pytest.raises(ExportError, match=r"attention\.self\.query\.weight requires gradients"):
        surgery.export(model, tmp_path, format="peft", example=example)
    surgery.export(model, tmp_path / "factors", format="peft", example=example, trained=False)
    names = load_file(tmp_path / "factors" / "adapter_model.safetensors")
    assert all("lora_" in name for name in names)


REFUSED: dict[str, tuple[str, list[Rule], str]] = {
    "a rewired model": (
        "bert",
        [Rule(LowRank(rank=2), where=QKV), Rule(surgery.Shortcuts())],
        "rule 'shortcuts' also changed",
    ),
    "dora in some layers": (
        "llama",
        [
            Rule(LowRank(method="dora", rank=2), where=Path("**.q_proj")),
            Rule(LowRank(rank=2), where=Path("**.v_proj")),
        ],
        "of an adapter of PEFT all layers do, or none",
    ),
    "dropouts that differ": (
        "llama",
        [
            Rule(LowRank(rank=2, dropout=0.1), where=Path("**.q_proj")),
            Rule(LowRank(rank=2), where=Path("**.v_proj")),
        ],
        "has one dropout",
    ),
    "a parameter of the model itself": (
        "timm_vit",
        [Rule(LowRank(rank=2), where=Path("pos_embed"))],
        "a parameter of the model itself",
    ),
    "a convolution of groups": (
        "timm_convnext",
        [Rule(LowRank(rank=2), where=Path("**.conv_dw"))],
        "PEFT's A sees all channels",
    ),
    "a module whose children others read": (
        "vit",
        [Rule(LowRank(rank=1), where=Path("embeddings.position_embeddings"))],
        "does not load or run the adapter",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_say_is_refused(case: str, tmp_path: FilePath) -> None:
    name, rules, said = REFUSED[case]
    model, example, _ = adapted(name, rules)
    with pytest.raises(ExportError, match=said):
        surgery.export(model, tmp_path, format="peft", example=example)
    assert not list(tmp_path.iterdir())


class Attention(torch.nn.Module):
    """An attention of torch, whose forward reads the weights of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.attn = torch.nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return self.attn(y, y, y)[0]


def attention(path: str) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    stock = Attention().eval()
    model = copy.deepcopy(stock)
    surgery.apply(model, Rule(LowRank(rank=2), where=Path(path)))
    return stirred(model), torch.randn(2, 3, 4), stock


def test_the_fused_projection_of_torchs_attention(tmp_path: FilePath) -> None:
    model, example, stock = attention("attn.in_proj_weight")
    surgery.export(model, tmp_path, format="peft", example=example)
    assert config(tmp_path)["target_parameters"] == ["in_proj_weight"]
    call = surgery.Example((example,))
    assert apart(stock, model, call) > 1e-3
    assert apart(model, by_peft(stock, tmp_path), call) < CLOSE
    assert apart(model, surgery.load_adapter(stock, tmp_path), call) < CLOSE


def test_a_weight_that_another_module_reads_is_refused(tmp_path: FilePath) -> None:
    model, example, _ = attention("attn.out_proj")
    with pytest.raises(ExportError, match="computes something else than the model"):
        surgery.export(model, tmp_path, format="peft", example=example)
    assert not list(tmp_path.iterdir())


def test_merged_adapters_are_refused(tmp_path: FilePath) -> None:
    model, example, _ = adapted("llama", [Rule(LowRank(rank=2), where=QKV)])
    adapters.merge(model)
    with pytest.raises(ExportError, match=r"surgery\.adapters\.unmerge first"):
        surgery.export(model, tmp_path, format="peft", example=example)


def test_a_split_weight_without_a_way_back_is_refused(tmp_path: FilePath) -> None:
    made = LowRank(method="pissa", rank=2, keep_base="none")
    model, example, _ = adapted("llama", [Rule(made, where=QKV)])
    with pytest.raises(ExportError, match="cannot be checked beside the stock model"):
        surgery.export(model, tmp_path, format="peft", example=example)


def test_the_model_is_left_as_it_was(tmp_path: FilePath) -> None:
    rule = Rule(LowRank(method="pissa", rank=2), where=QKV)
    model, example, _ = adapted("llama", [rule])
    model.train()
    before = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    surgery.export(model, tmp_path, format="peft", example=example)
    after = dict(model.named_parameters())
    assert model.training
    assert list(after) == list(before)
    for name, (identity, values, trained) in before.items():
        assert id(after[name]) == identity
        assert torch.equal(after[name], values)
        assert after[name].requires_grad == trained


def test_the_file_is_the_same_every_time(tmp_path: FilePath) -> None:
    model, example, _ = adapted("llama", [Rule(LowRank(rank=2), where=QKV)])
    for name in ("one", "other"):
        surgery.export(model, tmp_path / name, format="peft", example=example)
    one, other = (provenance.read(tmp_path / name).files for name in ("one", "other"))
    assert one == other


def test_the_task_of_a_language_model_is_known(tmp_path: FilePath) -> None:
    for name, task in (("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", None)):
        model, example, _ = adapted(name, [Rule(LowRank(rank=1), where=QKV)])
        surgery.export(model, tmp_path / name, format="peft", example=example)
        assert config(tmp_path / name)["task_type"] == task


def test_models_without_adapters_do_not_fit() -> None:
    model, _ = zoo.build("llama")
    (fit,) = [fit for fit in fits(model) if fit.format == "peft"]
    assert fit.misfit is not None
    assert "no adapters" in fit.misfit
