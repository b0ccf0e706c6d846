"""Local folders in the hub's layout: what loads, and every way a checkpoint can be wrong."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from surgery import CheckpointError, SourceError, SurgeryError, load
from surgery.sources import SOURCE_ATTRIBUTE, Example
from tests import zoo

SHARD = 100_000
SAVED = [*zoo.names("transformers"), *zoo.names("diffusers")]


def output(model: nn.Module, example: Example) -> torch.Tensor:
    with torch.no_grad():
        result: Any = model.eval()(*example.args, **example.kwargs)
    return result if isinstance(result, torch.Tensor) else result[0]


def same(model: nn.Module, other: nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert type(model) is type(other)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def save_timm(model: Any, folder: Path, *, weights: str = "model.safetensors") -> None:
    """The layout of timm's own push to the hub."""
    folder.mkdir(exist_ok=True)
    config = {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": model.num_classes,
        "model_args": dict(model._model_args),
        "pretrained_cfg": {"num_classes": model.num_classes, "input_size": [3, 32, 32]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    if weights.endswith(".bin"):
        torch.save(model.state_dict(), folder / weights)
    else:
        save_file(model.state_dict(), folder / weights)


@pytest.mark.parametrize(
    ("name", "shard"),
    [*((name, SHARD) for name in SAVED), ("llama", 10**9), ("AutoencoderKL", 10**9)],
)
def test_round_trip(name: str, shard: int, tmp_path: Path) -> None:
    model, example = zoo.build(name)
    saveable: Any = model
    saveable.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == SHARD)
    loaded = load(tmp_path)
    same(loaded, model)
    assert torch.equal(output(loaded, example), output(model, example))
    source = loaded.__dict__[SOURCE_ATTRIBUTE]
    assert source["pretrained"]
    assert len(source["files"]) == len(list(tmp_path.glob("*.safetensors")))
    assert json.loads(json.dumps(source)) == source


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ["timm_vit", "timm_swin", "timm_resnet", "timm_convnext"])
def test_round_trip_timm(name: str, weights: str, tmp_path: Path) -> None:
    model, example = zoo.build(name)
    save_timm(model, tmp_path, weights=weights)
    loaded = load(str(tmp_path))
    same(loaded, model)
    assert torch.equal(output(loaded, example), output(model, example))
    assert "state_dict" not in vars(loaded)["pretrained_cfg"]


def test_sharded_timm(tmp_path: Path) -> None:
    model, _ = zoo.build("timm_vit")
    save_timm(model, tmp_path)
    split(tmp_path / "model.safetensors")
    same(load(tmp_path), model)


def split(path: Path) -> None:
    """Turn one safetensors file into two shards and an index."""
    state = load_file(path)
    keys = sorted(state)
    halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    weight_map: dict[str, str] = {}
    for number, half in enumerate(halves, start=1):
        name = f"{path.stem}-{number:05d}-of-00002.safetensors"
        save_file({key: state[key].clone() for key in half}, path.with_name(name))
        weight_map |= dict.fromkeys(half, name)
    index = {"metadata": {}, "weight_map": weight_map}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    path.unlink()


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    model, _ = zoo.build("bert")
    saveable: Any = model
    saveable.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    model, _ = zoo.build("DiTTransformer2DModel")
    saveable: Any = model
    saveable.save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


@pytest.mark.parametrize(
    ("arguments", "dtype", "device", "pretrained"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16, "cpu", True),
        ({"pretrained": False}, torch.float32, "cpu", False),
        ({"device": "meta"}, torch.float32, "meta", False),
    ],
)
def test_arguments(
    arguments: dict[str, Any],
    dtype: torch.dtype,
    device: str,
    pretrained: bool,
    bert: Path,
    dit: Path,
) -> None:
    for folder in (bert, dit):
        model = load(folder, **arguments)
        parameter = next(model.parameters())
        assert (parameter.dtype, parameter.device.type) == (dtype, device)
        assert model.__dict__[SOURCE_ATTRIBUTE]["pretrained"] == pretrained


def test_configuration_only_needs_no_weights(bert: Path, dit: Path) -> None:
    (bert / "model.safetensors").unlink()
    (dit / "diffusion_pytorch_model.safetensors").unlink()
    for folder in (bert, dit):
        assert load(folder, pretrained=False)


def test_base_model_prefix_is_handled_by_the_library(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    config.num_attention_heads = 4
    classifier = BertForSequenceClassification(config)
    classifier.save_pretrained(tmp_path)
    into = {"architectures": ["BertModel"]}
    with pytest.raises(CheckpointError, match=r"does not have \(classifier\.bias"):
        load(tmp_path, config=into)
    base: Any = load(tmp_path, config=into, allow_unexpected=True)
    assert type(base).__name__ == "BertModel"
    words = base.embeddings.word_embeddings.weight
    assert torch.equal(words, classifier.bert.embeddings.word_embeddings.weight)


def test_new_head_only_when_asked_for(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    into = {"architectures": ["BertForSequenceClassification"]}
    with pytest.raises(CheckpointError, match=r"(?s)missing.*classifier\.bias.*allow_missing=True"):
        load(bert, config=into)
    with caplog.at_level(logging.WARNING, logger="surgery"):
        model = load(bert, config=into, allow_missing=True)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert "randomly initialised: ['classifier.bias', 'classifier.weight']" in caplog.text


def test_new_timm_head_only_when_asked_for(tmp_path: Path) -> None:
    model, _ = zoo.build("timm_vit")
    save_timm(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)have 10 classes.*num_classes=3.*allow_missing"):
        load(tmp_path, config={"num_classes": 3})
    loaded: Any = load(tmp_path, config={"num_classes": 3}, allow_missing=True)
    assert loaded.head.weight.shape == (3, 32)
    assert torch.equal(loaded.pos_embed, model.get_parameter("pos_embed"))


def test_pickle_of_tensors_is_read(bert: Path, dit: Path) -> None:
    for folder, old, new in (
        (bert, "model.safetensors", "pytorch_model.bin"),
        (dit, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    ):
        expected = load(folder)
        torch.save(load_file(folder / old), folder / new)
        (folder / old).unlink()
        same(load(folder), expected)


class _Payload:
    """Writes a file when it is unpickled by a loader that runs code."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.target, "owned")


@pytest.mark.parametrize("name", ["bert", "dit", "timm"])
def test_pickle_with_code_is_refused(name: str, tmp_path: Path, bert: Path, dit: Path) -> None:
    folder = {"bert": bert, "dit": dit, "timm": tmp_path / "timm"}[name]
    if name == "timm":
        save_timm(zoo.build("timm_vit")[0], folder)
    stem = "diffusion_pytorch_model" if name == "dit" else "pytorch_model"
    for file in folder.glob("*.safetensors"):
        file.unlink()
    trap = tmp_path / "owned"
    torch.save({"weight": _Payload(trap)}, folder / f"{stem}.bin")
    with pytest.raises(CheckpointError, match=r"\.bin: refused: .*could run code"):
        load(folder)
    assert not trap.exists()


def test_bare_pickle_is_refused(bert: Path, tmp_path: Path) -> None:
    (bert / "model.safetensors").unlink()
    trap = tmp_path / "owned"
    (bert / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": _Payload(trap)}, 2))
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin: (refused|truncated or corrupt)"
    ):
        load(bert)
    assert not trap.exists()


def test_variant(bert: Path) -> None:
    expected = load(bert)
    (bert / "model.safetensors").rename(bert / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"found config\.json, model\.fp16\.safetensors"):
        load(bert)
    same(load(bert, variant="fp16"), expected)


# How a folder is broken, and what must be said about it. Each takes the folder of a sharded model.


def truncated(folder: Path) -> None:
    shard = next(folder.glob("*-00001-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def longer(folder: Path) -> None:
    shard = next(folder.glob("*-00001-*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b"\0" * 8)


def headless(folder: Path) -> None:
    shard = next(folder.glob("*-00001-*.safetensors"))
    shard.write_bytes(b"\1\2\3")


def not_safetensors(folder: Path) -> None:
    shard = next(folder.glob("*-00001-*.safetensors"))
    shard.write_bytes(struct.pack("<Q", 4) + b"spam")


def lfs_pointer(folder: Path) -> None:
    shard = next(folder.glob("*-00001-*.safetensors"))
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def shard_gone(folder: Path) -> None:
    next(folder.glob("*-00002-*.safetensors")).unlink()


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = next(folder.glob("*.index.json"))
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def shard_not_listed(folder: Path) -> None:
    def change(weight_map: dict[str, str]) -> None:
        for key in [key for key, shard in weight_map.items() if "-00002-" in shard]:
            del weight_map[key]

    edit_index(folder, change)


def key_not_listed(folder: Path) -> None:
    edit_index(folder, lambda weight_map: weight_map.pop("embeddings.LayerNorm.bias"))


def key_not_held(folder: Path) -> None:
    def change(weight_map: dict[str, str]) -> None:
        weight_map["ghost.weight"] = weight_map["embeddings.LayerNorm.bias"]

    edit_index(folder, change)


def escaping(folder: Path) -> None:
    shutil.copy(next(folder.glob("*-00001-*.safetensors")), folder.parent / "x.safetensors")
    edit_index(folder, lambda weights: weights.update({"a": "../x.safetensors"}))


def absolute(folder: Path) -> None:
    edit_index(folder, lambda weights: weights.update({"a": str(folder / "x.safetensors")}))


def windows_path(folder: Path) -> None:
    edit_index(folder, lambda weights: weights.update({"a": "..\\x.safetensors"}))


def other_kind(folder: Path) -> None:
    edit_index(folder, lambda weights: weights.update({"a": "evil.bin"}))


def empty_index(folder: Path) -> None:
    edit_index(folder, lambda weights: weights.clear())


def index_not_json(folder: Path) -> None:
    next(folder.glob("*.index.json")).write_text("{")


def no_weights(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    no_weights(folder)
    change(state)
    save_file(state, folder / "model.safetensors")


def key_missing(folder: Path) -> None:
    rewrite(folder, lambda state: state.pop("pooler.dense.bias"))


def key_unknown(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({"extra.weight": torch.zeros(1)}))


def key_of_other_shape(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({"pooler.dense.bias": torch.zeros(7)}))


def config_gone(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("not json")


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def moved_away(file: Path, name: str) -> None:
    """Leave a link to somewhere outside of the folder."""
    file.rename(file.parent.parent / name)
    file.symlink_to(file.parent.parent / name)


def shard_elsewhere(folder: Path) -> None:
    moved_away(next(folder.glob("*-00001-*.safetensors")), "elsewhere.safetensors")


def config_elsewhere(folder: Path) -> None:
    moved_away(folder / "config.json", "elsewhere.json")


def index_and_file(folder: Path) -> None:
    shutil.copy(next(folder.glob("*-00001-*.safetensors")), folder / "model.safetensors")


def key_twice(folder: Path) -> None:
    path = folder / "config.json"
    text = path.read_text().lstrip("{ \n")
    path.write_text('{"_name_or_path": "a", "_name_or_path": "b", ' + text)


def overlap(folder: Path) -> None:
    shard = next(folder.glob("*-00001-*.safetensors"))
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    other = next(n for n in names[1:] if header[n]["shape"] == header[names[0]]["shape"])
    header[other]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (truncated, r"model-00001-of-00002\.safetensors is truncated: \d+ bytes, its header says \d+"),
    (longer, r"model-00001-of-00002\.safetensors is damaged: \d+ bytes, its header says \d+"),
    (headless, r"is truncated: 3 bytes are no safetensors file"),
    (not_safetensors, r"is not a safetensors file: its header is no JSON object"),
    (lfs_pointer, r"is a Git LFS pointer, not the weights.*git lfs pull"),
    (shard_gone, r"names the shard 'model-00002-of-00002\.safetensors', which is not there"),
    (shard_not_listed, r"the shard 'model-00002-of-00002\.safetensors' is there, .*not list it"),
    (key_not_listed, r"holds 'embeddings\.LayerNorm\.bias', which .* does not list"),
    (key_not_held, r"holds 'ghost\.weight', which it does not"),
    (escaping, r"'a' gives the path '\.\./x\.safetensors', which lies outside the folder"),
    (absolute, r"'a' gives the path '/.*x\.safetensors', which lies outside the folder"),
    (windows_path, r"which lies outside the folder"),
    (other_kind, r"gives 'evil\.bin', expected a \.safetensors file"),
    (empty_index, r"expected a non-empty 'weight_map'"),
    (index_not_json, r"index\.json: not valid JSON"),
    (no_weights, r"holds no weights: expected model\.safetensors .*found config\.json"),
    (key_missing, r"1 keys missing from the checkpoint \(pooler\.dense\.bias\)"),
    (key_unknown, r"1 keys the model does not have \(extra\.weight\)"),
    (key_of_other_shape, r"\(pooler\.dense\.bias: expected \[32\], received \[7\]\)"),
    (config_gone, r"has no config\.json"),
    (config_not_json, r"config\.json: not valid JSON"),
    (config_is_a_list, r"expected a JSON object, got list"),
    (shard_elsewhere, r"is a link to .*elsewhere\.safetensors, outside of its folder"),
    (config_elsewhere, r"config\.json is a link to .*, outside of its folder"),
    (index_and_file, r"holds model\.safetensors and model\.safetensors\.index\.json, and lib"),
    (key_twice, r"the key '_name_or_path' is there twice"),
    (overlap, r"its tensors overlap or leave gaps"),
]


@pytest.mark.parametrize(
    ("damage", "message"), BROKEN, ids=[damage.__name__ for damage, _ in BROKEN]
)
def test_broken_checkpoint(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    model: Any = zoo.build("bert")[0]
    model.save_pretrained(tmp_path / "bert", max_shard_size=SHARD)
    damage(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load(tmp_path / "bert")


CONFIGS: list[tuple[dict[str, object], str]] = [
    ({"architectures": ["NoSuchModel"]}, "no model class 'NoSuchModel'; code that comes with a"),
    ({"model_type": "brt"}, "no model type 'brt'.*did you mean 'bert'"),
    (
        {"model_type": "own", "auto_map": {"AutoModel": "modeling_own.Own"}},
        "auto_map.*never run",
    ),
    ({"quantization_config": {"quant_method": "x"}}, "already quantised"),
    ({"fusion_config": {"patch_embeddings": True}}, "fused replacements"),
    ({"attn_implementation": "org/kernel"}, "would download code"),
    ({"model_type": None, "architectures": None}, "none of '_class_name'.*'architecture'"),
    ({"_class_name": "DDPMScheduler"}, "no model class 'DDPMScheduler'"),
    ({"_class_name": "os.system"}, "no model class 'os.system'"),
    ({"architecture": "resnet"}, "timm .* has no model 'resnet'"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_config_that_asks_for_something_else(
    changes: dict[str, object], message: str, bert: Path
) -> None:
    edit_config(bert, **changes)
    with pytest.raises(SourceError, match=f"(?s){message}"):
        load(bert)


def test_files_next_to_the_weights_are_not_followed(bert: Path, tmp_path: Path) -> None:
    """An adapter or a distributed checkpoint beside the weights would make the library open it."""
    expected = load(bert)
    (bert / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x/y"}))
    (bert / "dist").mkdir()
    (bert / ".metadata").write_bytes(pickle.dumps(_Payload(tmp_path / "owned")))
    edit_config(bert, transformers_weights="../x.safetensors")
    same(load(bert), expected)
    assert not (tmp_path / "owned").exists()


def test_other_kinds_of_folder(tmp_path: Path) -> None:
    pipeline = {"_class_name": "P", "unet": ["diffusers", "UNet"], "safety": [None, None]}
    cases: list[tuple[str, object, str, type[SurgeryError]]] = [
        ("model_index.json", pipeline, r"pipeline of several models: unet\n.*/unet", SourceError),
        ("surgery.json", {}, r"surgery\.restore", SourceError),
        ("adapter_config.json", {}, r"surgery\.load_adapter", SourceError),
        ("readme.md", {}, r"has no config\.json", CheckpointError),
    ]
    for name, content, message, kind in cases:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        with pytest.raises(kind, match=message):
            load(folder)


def test_one_model_of_a_pipeline(dit: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"dit": ["diffusers", "DiT"]}))
    assert type(load(tmp_path / dit.name)).__name__ == "DiTTransformer2DModel"


def test_generation_config_is_kept(tmp_path: Path) -> None:
    model: Any = zoo.build("llama")[0]
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    loaded: Any = load(tmp_path)
    assert loaded.generation_config.max_new_tokens == 7


def test_buffers_that_old_checkpoints_held(bert: Path) -> None:
    """all-MiniLM-L6-v2 still holds position ids, which its class no longer keeps as weights."""
    expected = load(bert)
    state = load_file(bert / "model.safetensors")
    state["embeddings.position_ids"] = torch.arange(64)[None]
    save_file(state, bert / "model.safetensors")
    same(load(bert), expected)
