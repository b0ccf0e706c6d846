"""Folders of an unchanged architecture: merged, cast and cut, for ``from_pretrained``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import surgery
from surgery import LowRank, Rule, progress
from surgery import Path as At
from surgery.exporting import provenance
from tests.zoo import build

QKV = At("model.layers.*.self_attn.*_proj")


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model, _ = build(name)
    model.to(dtype).save_pretrained(folder, max_shard_size="10KB")  # type: ignore[operator]
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"no weights that were converted")
    return folder


def adapted(
    source: Path, method: str, where: Any, *, dtype: torch.dtype | None = None
) -> nn.Module:
    stock = surgery.load(source, dtype=dtype)
    model = surgery.apply(stock, Rule(LowRank(method=method, rank=2), where=where))
    with torch.no_grad():
        for parameter in surgery.adapters.parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def contents(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("kind", ["surgery", "peft"])
@pytest.mark.parametrize(
    ("name", "method", "where"),
    [
        ("llama", "lora", QKV),
        ("llama", "dora", QKV),
        ("gpt2", "lora", At("transformer.h.*.mlp.c_fc")),
        ("mixtral", "lora", At("model.layers.*.mlp.experts.*")),
    ],
)
def test_merge_is_that_of_the_loaded_model(
    name: str, method: str, where: Any, kind: str, tmp_path: Path
) -> None:
    source = saved(name, tmp_path / "source", torch.bfloat16)
    model = adapted(source, method, where)
    if kind == "peft":
        surgery.export(model, tmp_path / "adapter", format="peft")
    else:
        surgery.save(model, tmp_path / "adapter", adapter_only=True)
    surgery.convert(source, None, tmp_path / "got", adapter=tmp_path / "adapter", threads=2)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "got").state_dict()
    model = adapted_again(source, tmp_path / "adapter", kind)
    surgery.adapters.merge(model)
    wanted = model.state_dict()
    stored = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert any(not torch.equal(tensor, stored[path]) for path, tensor in got.items())
    for path, tensor in got.items():
        # In bfloat16 one rounding: sums in another order give another of two neighbours, rarely.
        torch.testing.assert_close(tensor, wanted[path], rtol=2**-7, atol=0)


def adapted_again(source: Path, adapter: Path, kind: str) -> nn.Module:
    model = surgery.load(source)
    if kind == "peft":
        return surgery.load_adapter(model, adapter)
    return surgery.restore(adapter, model=model)


def test_saved_adapter_that_split_the_weight(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    model = adapted(source, "pissa", QKV)
    surgery.save(model, tmp_path / "adapter", adapter_only=True)
    surgery.adapters.merge(model)
    surgery.convert(source, None, tmp_path / "got", adapter=tmp_path / "adapter")
    got = contents(tmp_path / "got")
    for name, tensor in model.state_dict().items():
        if name in got:
            # W - s B0 A0 + s B A in float32, in chunks.
            torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beside", [torch.float32, torch.bfloat16])
def test_saved_adapter_is_merged_and_cast_in_one_call(beside: torch.dtype, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source", torch.float32)
    model = adapted(source, "lora", QKV, dtype=beside)
    surgery.save(model, tmp_path / "adapter", adapter_only=True)
    adapter = tmp_path / "adapter"
    surgery.convert(source, None, tmp_path / "got", adapter=adapter, dtype="bfloat16")
    surgery.convert(source, None, tmp_path / "wide", adapter=adapter, allow_other_base=True)
    got, wide = contents(tmp_path / "got"), contents(tmp_path / "wide")
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    stored = contents(source)
    assert any(not torch.equal(wide[name], stored[name]) for name in wide)
    for name, tensor in got.items():
        # The factors are not rounded before the sum is.
        assert torch.equal(tensor, wide[name].to(torch.bfloat16)), name
    assert surgery.prove(tmp_path / "got", against=source, adapter=adapter).ok


def test_a_weight_is_settled_in_the_dtype_it_was_trained_in(tmp_path: Path) -> None:
    source = tmp_path / "source"
    # diffusers loads half precision as float32 where no dtype is asked for.
    build("UNet2DConditionModel")[0].half().save_pretrained(source)  # type: ignore[operator]
    model = adapted(source, "pissa", surgery.Role("attention.qkv"))
    surgery.save(model, tmp_path / "adapter", adapter_only=True)
    surgery.adapters.merge(model)
    adapter = tmp_path / "adapter"
    surgery.convert(source, None, tmp_path / "got", adapter=adapter, dtype="float32")
    got = contents(tmp_path / "got")
    wanted = model.state_dict()
    assert got.keys() & wanted.keys()
    for name in got.keys() & wanted.keys():
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-6)


def test_cast_is_that_of_the_library(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    surgery.convert(source, None, tmp_path / "got", dtype="bfloat16")
    wanted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "got")
    assert got.dtype == torch.bfloat16
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor)
    config = json.loads((tmp_path / "got" / "config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    assert config == {**before, "dtype": "bfloat16"}


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_halves_are_cast_as_torch_does(
    pair: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    source = saved("llama", tmp_path / "source", pair[0])
    surgery.convert(source, None, tmp_path / "got", dtype=pair[1])
    stored = contents(source)
    for name, tensor in contents(tmp_path / "got").items():
        assert torch.equal(tensor, stored[name].to(pair[1]))


def test_cut_anew_keeps_every_byte(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    done = surgery.convert(source, None, tmp_path / "one", max_shard_size="1GB")
    assert "model.safetensors" in done.files
    assert "model.safetensors.index.json" not in done.files
    surgery.convert(tmp_path / "one", None, tmp_path / "many", max_shard_size="4KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    stored = contents(source)
    for folder in (tmp_path / "one", tmp_path / "many"):
        found = contents(folder)
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())


def test_small_files_come_along_and_weights_do_not(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    surgery.convert(source, None, tmp_path / "got", dtype="float16")
    names = {path.name for path in (tmp_path / "got").iterdir()}
    assert "tokenizer.json" in names
    assert "pytorch_model.bin" not in names
    told = provenance.read(tmp_path / "got")
    assert told.export == "convert"
    assert told.options["dtype"] == "float16"
    assert {name for name in names if name != "surgery.json"} == set(told.files)
    for name, file in provenance.files_of(tmp_path / "got").items():
        assert told.files[name] == file
    for name, file in told.origin.items():
        assert file == provenance.files_of(source)[name]


def test_converts_over_its_own_output_and_nothing_else(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    surgery.convert(source, None, tmp_path / "got", dtype="float16")
    surgery.convert(source, None, tmp_path / "got", dtype="bfloat16")
    assert provenance.read(tmp_path / "got").options["dtype"] == "bfloat16"
    (tmp_path / "got" / "mine.txt").write_text("mine")
    with pytest.raises(surgery.ExportError, match=r"mine\.txt"):
        surgery.convert(source, None, tmp_path / "got", dtype="float16")
    assert (tmp_path / "got" / "mine.txt").read_text() == "mine"


def test_values_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    model = surgery.load(source)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[:2] = torch.tensor([torch.nan, torch.inf])
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = 1e30
    model.save_pretrained(tmp_path / "bad")  # type: ignore[operator]
    done = surgery.convert(tmp_path / "bad", None, tmp_path / "got", dtype="float16")
    assert done.not_finite == {"model.norm.weight": 2, "model.layers.0.mlp.up_proj.weight": 1}
    assert "NaN or infinite" in str(done)


def test_progress_tells_bytes_speed_and_what_is_left(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None, str]] = []

    class Listener:
        def started(self, task: progress.Task) -> None: ...

        def advanced(self, task: progress.Task) -> None:
            seen.append((task.title, task.done, task.total, task.note))

        def finished(self, task: progress.Task) -> None: ...

    source = saved("llama", tmp_path / "source")
    with progress.listen(Listener()):
        done = surgery.convert(source, None, tmp_path / "got", dtype="bfloat16", threads=2)
    told = [each for each in seen if each[0] == "converting"]
    assert [each[1] for each in told] == sorted(each[1] for each in told)
    weights = sum(size for name, size in done.files.items() if name.endswith(".safetensors"))
    assert {each[2] for each in told} == {weights}
    assert re.fullmatch(r"[\d.]+ \w+/s, 0:00 left", told[-1][3])
