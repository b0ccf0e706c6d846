"""Adapters that PEFT saved, as adapters of ours: the same outputs, and a rewrite like any other."""

from __future__ import annotations

import copy
import json
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery import LowRank, Rule, adapters
from surgery import Path as PathIs
from surgery.errors import CheckpointError, Conflict
from surgery.exporting import outputs
from tests import zoo
from tests.interchange.peers import CLOSE, apart, by_peft, in_peft

pytestmark = [
    # torchao and PEFT announce changes of other libraries while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # What PEFT saves of embeddings, and Conv1D beside nn.Linear: both are meant here.
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning"),
]

LINEAR = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    "rslora, with ranks and alphas of their own": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": LINEAR,
            "rank_pattern": {"down_proj": 2, r"^model\.layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"layers.0.*.v_proj": 3.5},
        },
    ),
    "some layers": (
        "llama",
        {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    ),
    "dora": ("llama", {"r": 4, "use_dora": True, "target_modules": LINEAR}),
    "pissa, not converted": (
        "llama",
        {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa", "target_modules": LINEAR},
    ),
    "olora, not converted": (
        "llama",
        {"r": 4, "lora_alpha": 6, "init_lora_weights": "olora", "target_modules": LINEAR},
    ),
    "Conv1D": (
        "gpt2",
        {"r": 4, "target_modules": ["c_attn", "wpe", "c_fc"], "fan_in_fan_out": True},
    ),
    "Conv1D with dora": (
        "gpt2",
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "experts": (
        "qwen3_moe",
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": ["q_proj"],
            "target_parameters": ["gate_up_proj", "experts.down_proj"],
        },
    ),
    "one parameter of the experts": (
        "mixtral",
        {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]},
    ),
    "a layer's weight by its name": (
        "llama",
        {"r": 2, "target_modules": [], "target_parameters": ["q_proj.weight"]},
    ),
    "embeddings": ("bert", {"r": 4, "target_modules": ["query", "dense", "word_embeddings"]}),
    "vit": ("vit", {"r": 4, "target_modules": ["projection", "query", "q_proj", "k_proj"]}),
    "unet": (
        "UNet2DConditionModel",
        {"r": 4, "lora_alpha": 2, "target_modules": ["conv1", "conv_shortcut", "to_q", "proj_in"]},
    ),
    "convolutions with dora": (
        "UNet2DConditionModel",
        {"r": 4, "use_dora": True, "target_modules": ["conv1", "to_q"]},
    ),
    "sd3": ("SD3Transformer2DModel", {"r": 2, "target_modules": ["to_q", "add_k_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_peft(case: str, tmp_path: FilePath) -> None:
    name, config = CASES[case]
    model, example = zoo.build(name)
    stock = copy.deepcopy(model)
    wrapped = in_peft(model, **config)
    wrapped.save_pretrained(tmp_path)
    assert surgery.load_adapter(model, tmp_path) is model
    assert apart(wrapped, model, example) < CLOSE
    # The adapter matters, and is out again as if it had never been there.
    assert apart(stock, model, example) > 1e-3
    surgery.undo(model)
    assert apart(stock, model, example) == 0.0
    assert list(model.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(t, stock.state_dict()[n]) for n, t in model.state_dict().items())


def llama() -> tuple[Any, Any, Any]:
    """A tiny model, its example, and an untouched copy."""
    model, example = zoo.build("llama")
    return model, example, copy.deepcopy(model)


def saved(model: Any, folder: FilePath, **config: Any) -> Any:
    wrapped = in_peft(model, **{"r": 2, "target_modules": ["q_proj", "v_proj"], **config})
    wrapped.save_pretrained(folder)
    return wrapped


def test_pissa_that_peft_converted(tmp_path: FilePath) -> None:
    model, example, _ = llama()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"])
    wrapped: Any = get_peft_model(copy.deepcopy(model), config).eval()
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    conversion = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")}
    wrapped.save_pretrained(tmp_path / "end", **conversion)
    surgery.load_adapter(model, tmp_path / "end")
    # PEFT turns the adapter into the converted one while it saves it.
    assert apart(by_peft(llama()[0], tmp_path / "end"), model, example) < CLOSE
    assert next(iter(adapters.parameters(model))).shape[0] == 4


def test_it_is_a_rewrite_like_any_other(tmp_path: FilePath) -> None:
    model, example, _ = llama()
    wrapped = saved(model, tmp_path / "peft", lora_alpha=6)
    surgery.load_adapter(model, tmp_path / "peft", adapter="french")
    assert adapters.names(model) == ("french",)
    report = surgery.verify(model, example=example)
    assert report.ok
    surgery.save(model, tmp_path / "ours")
    again = surgery.restore(tmp_path / "ours", llama()[0])
    assert apart(model, again.eval(), example) == 0.0
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".lowrank.french." in name for name in trainable)
    adapters.merge(model)
    assert apart(wrapped, model, example) < CLOSE


def test_the_rule_names_the_layers_in_few_patterns(tmp_path: FilePath) -> None:
    model, _, _ = llama()
    saved(model, tmp_path, rank_pattern={r"layers\.2\..*v_proj": 1})
    surgery.load_adapter(model, tmp_path)
    record = model._surgery_record
    paths = [rule["where"]["path"] for rule in record.operations[0].recipe["rules"]]
    assert paths[0][0] == "model.layers.*.self_attn.q_proj"
    assert paths[1] == "model.layers.2.self_attn.v_proj"


def test_several_adapters_side_by_side(tmp_path: FilePath) -> None:
    model, example, stock = llama()
    first = saved(model, tmp_path / "a")
    second = saved(model, tmp_path / "b", r=3, target_modules=["k_proj", "q_proj"])
    surgery.load_adapter(model, tmp_path / "a", adapter="a")
    surgery.load_adapter(model, tmp_path / "b", adapter="b")
    for name, wrapped in (("a", first), ("b", second)):
        with adapters.using(model, name):
            assert apart(wrapped, model, example) < CLOSE
    both: Any = by_peft(stock, tmp_path / "a")
    both.load_adapter(str(tmp_path / "b"), "b")
    both.base_model.set_adapter(["default", "b"])
    assert apart(both.eval(), model, example) < CLOSE
    with pytest.raises(Conflict, match="give their adapters different names"):
        surgery.load_adapter(model, tmp_path / "a", adapter="b")


def test_stock_weights_that_were_trained_along(tmp_path: FilePath) -> None:
    model, example, _ = llama()
    wrapped = in_peft(model, r=2, target_modules=["q_proj"], modules_to_save=["norm"], bias="none")
    with torch.no_grad():
        wrapped.base_model.model.model.norm.modules_to_save["default"].weight.mul_(1.7)
    wrapped.save_pretrained(tmp_path)
    surgery.load_adapter(model, tmp_path)
    assert apart(wrapped, model, example) < CLOSE
    assert model.model.norm.weight.requires_grad
    surgery.undo(model)
    assert torch.equal(
        model.model.norm.weight, wrapped.base_model.model.model.norm.modules_to_save.default.weight
    )


@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_biases_that_were_trained_along(which: str, tmp_path: FilePath) -> None:
    model, example = zoo.build("bert")
    wrapped = in_peft(model, r=2, target_modules=["query"], bias=which)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(0.1)
    wrapped.save_pretrained(tmp_path)
    surgery.load_adapter(model, tmp_path)
    assert apart(wrapped, model, example) < CLOSE
    norms = [n for n, p in model.named_parameters() if p.requires_grad and "LayerNorm" in n]
    assert bool(norms) == (which == "all")


def test_factors_keep_their_precision_beside_a_coarser_weight(tmp_path: FilePath) -> None:
    model, _, _ = llama()
    saved(model, tmp_path)
    surgery.load_adapter(model.bfloat16(), tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    found = dict(model.named_parameters())["model.layers.0.self_attn.q_proj.lowrank.default.lora_A"]
    assert found.dtype == torch.float32
    assert torch.equal(
        found, file["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    )


def test_dropout_comes_along(tmp_path: FilePath) -> None:
    model, _ = zoo.build("bert")
    saved(model, tmp_path, lora_dropout=0.25, target_modules=["query", "word_embeddings"])
    surgery.load_adapter(model, tmp_path)
    rules = model._surgery_record.operations[0].recipe["rules"]
    assert {rule["with"]["dropout"] for rule in rules} == {0.25, 0.0}


# --- Adapters that do not fit --------------------------------------------------------------------


def refused(model: Any, folder: FilePath, said: str) -> str:
    """Loading fails, and every tensor and every name of the model is as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(CheckpointError, match=said) as caught:
        surgery.load_adapter(model, folder)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [p.requires_grad for p in model.parameters()] == flags
    return str(caught.value)


def test_an_adapter_of_another_model_names_the_first_layers_that_differ(
    tmp_path: FilePath,
) -> None:
    saved(zoo.build("bert")[0], tmp_path, target_modules=["query"])
    said = refused(llama()[0], tmp_path, "belongs to another model")
    assert "encoder.layer.0.attention.self.query" in said
    assert "model.embed_tokens" in said


def test_an_adapter_of_another_size_names_the_shapes(tmp_path: FilePath) -> None:
    small, _, _ = llama()
    saved(small, tmp_path)
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 2 * small.config.hidden_size
    other = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=small.config.num_hidden_layers,
            num_attention_heads=2,
            vocab_size=9,
        )
    )
    said = refused(other, tmp_path, r"at model\.layers\.0\.self_attn\.q_proj")
    assert f"lora_A.weight is [2, {small.config.hidden_size}], expected [2, {width}]" in said


def test_a_shared_weight_of_which_one_use_is_adapted(tmp_path: FilePath) -> None:
    model, _ = zoo.build("gpt2")
    wrapped = in_peft(zoo.build("gpt2")[0], r=2, target_modules=["lm_head"])
    wrapped.save_pretrained(tmp_path)
    refused(model, tmp_path, "share one weight")


def test_a_convolution_that_peft_adapts_in_a_way_of_its_own(tmp_path: FilePath) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2))
    in_peft(model, r=2, target_modules=["0"]).save_pretrained(tmp_path)
    refused(model, tmp_path, "of 2 groups")


def test_a_layer_that_we_cannot_adapt(tmp_path: FilePath) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(4, 4)
            self.attn = torch.nn.MultiheadAttention(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.attn(y, y, y)[0]

    model = Net()
    in_peft(model, r=2, target_modules=["first", "attn"]).save_pretrained(tmp_path)
    refused(model, tmp_path, "adapts attn, a MultiheadAttention, which cannot be adapted here")


def test_trained_weights_of_one_of_two_tied_modules(tmp_path: FilePath) -> None:
    model, _ = zoo.build("gpt2")
    wrapped = in_peft(model, r=2, target_modules=["c_attn"], modules_to_save=["lm_head"])
    wrapped.save_pretrained(tmp_path)
    refused(model, tmp_path, r"trained weights for lm_head\.weight, which is one tensor")


def test_a_model_without_values(tmp_path: FilePath) -> None:
    model, _, _ = llama()
    saved(model, tmp_path)
    with pytest.raises(CheckpointError, match="on the meta device"):
        surgery.load_adapter(model.to("meta"), tmp_path)
    assert not adapters_in(model)


def adapters_in(model: Any) -> bool:
    return any("lowrank" in name for name, _ in model.named_parameters())


def edited(folder: FilePath, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **fields}))


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "another method of PEFT": ({"peft_type": "VERA"}, "peft_type"),
    "a random start that changed the weight": (
        {"init_lora_weights": "pissa_niter_4"},
        "path_initial_model_for_weight_conversion|of a weight that PEFT changed",
    ),
    "loftq": ({"init_lora_weights": "loftq"}, "of a weight that PEFT changed"),
    "an option that changes the computation": ({"use_qalora": True}, "use_qalora is True"),
    "an option that is newer than we are": ({"use_next_thing": {"a": 1}}, "use_next_thing"),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "a negative alpha": ({"lora_alpha": -1}, "lora_alpha"),
    "an alpha that is no number": ({"lora_alpha": "large"}, "lora_alpha"),
    "an infinite alpha": ({"alpha_pattern": {"q_proj": float("inf")}}, "Infinity is no number"),
    "a pattern that is none": ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    "a pattern that takes for ever": ({"alpha_pattern": {"(a|a)*b": 1}}, "bounded time"),
    "too many repetitions": ({"alpha_pattern": {"a*b*c*d*e": 1}}, "bounded time"),
    "dora without magnitudes": ({"use_dora": True}, "lacks lora_magnitude_vector"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_configuration_that_is_wrong(case: str, tmp_path: FilePath) -> None:
    fields, said = FIELDS[case]
    model, _, _ = llama()
    saved(model, tmp_path)
    edited(tmp_path, **fields)
    refused(model, tmp_path, said)


def rewritten(folder: FilePath, change: Any) -> None:
    from safetensors.torch import save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def renamed(to: str) -> Any:
    return lambda tensors: tensors.update({to: tensors.pop(FIRST)})


def valued(value: float) -> Any:
    return lambda tensors: tensors[FIRST][0].fill_(value)


DAMAGES: dict[str, tuple[Any, str]] = {
    "NaN": (valued(float("nan")), "q_proj.lora_A.weight holds values that are NaN"),
    "infinity": (valued(float("-inf")), "NaN or infinite"),
    "no prefix": (renamed("layers.0.q_proj.lora_A.weight"), "does not begin with"),
    "a name of training": (renamed(FIRST.replace("A.w", "A.default.w")), "no tensor of a plain"),
    "a bias in the branch": (
        lambda tensors: tensors.update({FIRST.replace("A.weight", "B.bias"): torch.ones(8)}),
        "lora_bias",
    ),
    "half a layer": (lambda tensors: tensors.pop(FIRST), "has no lora_A"),
    "the other half": (
        lambda tensors: tensors.pop(FIRST.replace("lora_A", "lora_B")),
        "has no lora_B.weight",
    ),
    "integers": (
        lambda tensors: tensors.update({FIRST: tensors[FIRST].int()}),
        "expected floating numbers",
    ),
    "a scalar": (lambda tensors: tensors.update({FIRST: torch.tensor(1.0)}), r"shape \[\]"),
    "a rank of none": (lambda tensors: tensors.update({FIRST: torch.ones(0, 64)}), "shape"),
    "transposed": (
        lambda tensors: tensors.update({FIRST: tensors[FIRST].T.contiguous()}),
        "rank|expected",
    ),
    "a module that does not exist": (
        renamed(FIRST.replace("layers.0", "layers.77")),
        r"model\.layers\.77",
    ),
    "a stock tensor that does not exist": (
        lambda tensors: tensors.update({"base_model.model.model.other.weight": torch.ones(2)}),
        "does not have",
    ),
    "another base weight": (
        lambda tensors: tensors.update(
            {
                FIRST.replace("lora_A", "base_layer"): torch.ones(
                    zoo.build("llama")[0].model.layers[0].self_attn.q_proj.weight.shape
                )
            }
        ),
        "another base weight",
    ),
    "nothing": (lambda tensors: tensors.clear(), "holds no layer"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_tensors_that_are_wrong(case: str, tmp_path: FilePath) -> None:
    change, said = DAMAGES[case]
    model, _, _ = llama()
    saved(model, tmp_path)
    rewritten(tmp_path, change)
    refused(model, tmp_path, said)


def test_files_that_are_no_adapter(tmp_path: FilePath) -> None:
    model, _, _ = llama()
    refused(model, tmp_path / "nowhere", "does not exist")
    (tmp_path / "notes.txt").write_text("nothing here")
    refused(model, tmp_path, "holds no adapter.*notes.txt")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    refused(model, tmp_path, "is a pickle")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(model, tmp_path, "is a pickle")
    (tmp_path / "adapter_model.bin").unlink()
    refused(model, tmp_path, "no adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    refused(model, tmp_path, "not valid JSON: nested too deeply")
    (tmp_path / "adapter_config.json").write_text("[]")
    refused(model, tmp_path, "received")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_the_folder(name: str, tmp_path: FilePath) -> None:
    model, _, _ = llama()
    saved(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / name
    file.rename(tmp_path / name)
    file.symlink_to(tmp_path / name)
    refused(model, tmp_path / "adapter", "is a link to .*, outside of its folder")


def test_a_truncated_file(tmp_path: FilePath) -> None:
    model, _, _ = llama()
    saved(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(model, tmp_path, "truncated|no safetensors|damaged")


def test_an_adapter_beside_one_of_ours(tmp_path: FilePath) -> None:
    model, example, _ = llama()
    wrapped = saved(model, tmp_path)
    surgery.apply(model, Rule(LowRank(adapter="own"), where=PathIs("**.q_proj")))
    surgery.load_adapter(model, tmp_path)
    # Its B is zero, so that it changes nothing.
    assert apart(wrapped, model, example) < CLOSE
    surgery.undo(model, last=1)
    assert adapters.names(model) == ("own",)
    assert outputs(model, example)
