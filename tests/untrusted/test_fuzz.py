"""Headers, indexes, logs, adapters and rule files that nobody wrote in good faith.

``make fuzz`` runs ten thousand cases, ``make test`` a few hundred, always the same ones. Whatever a
file says, reading it ends with the right tensors or with a ``SurgeryError``; nothing is written,
unpickled or run, and no tensor is made that is larger than the file.
"""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.checkpoints import manifest, tensorfile
from surgery.checkpoints.sharded import open_checkpoint
from surgery.errors import SurgeryError
from surgery.rules import Recipe
from surgery.train.config import PretrainConfig
from surgery.train.finetune.config import FinetuneConfig
from tests.untrusted.fuzzing import (
    CASES,
    WATCH,
    Allocations,
    Counted,
    Kind,
    assembled,
    cases,
    mutated,
    mutated_bytes,
    mutated_files,
    tensor_files,
)

#: What may be made besides what the file holds: scalars, and rows of a few numbers.
_SLACK = 4096
#: Memory that the whole run may take beyond what it began with, in bytes.
_GROWTH = 400 << 20


def fuzz(share: float) -> Callable[[Any], Any]:
    """Settings for a target that gets a share of all cases."""
    many = CASES >= 1000
    return settings(
        max_examples=max(20, round(CASES * share)),
        deadline=None,
        derandomize=not many,
        database=None,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if many else [])],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Any:
    with Allocations():
        torch.empty(1)  # torch imports its compiler here, which makes a folder for itself
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < _GROWTH


def ended(action: Callable[[], object], allowed: Path | None = None) -> str:
    """How it ended: ``taken``, or the kind of error; anything but a clear one is passed on."""
    with WATCH.only(allowed):
        try:
            action()
        except SurgeryError as error:
            found = error
        else:
            return "taken"
    assert found.message
    assert len(str(found)) < 10_000
    return type(found).__name__


# --- one file --------------------------------------------------------------------------------


def check_file(path: Path, kind: Kind, data: bytes) -> str:
    path.write_bytes(data)
    found: dict[str, torch.Tensor] = {}

    def read() -> None:
        found.update(tensorfile.read(path, tensorfile.contents(path)))
        tensorfile.metadata(path)

    with Allocations() as made:
        end = ended(read)
    assert made.largest <= len(data)
    if kind == "valid":
        assert end == "taken"
    if end == "taken":
        # Whatever is taken here, the format's own reader takes as well, and as the same.
        theirs = dict(safetensors.deserialize(data))
        assert {n: list(t.shape) for n, t in found.items()} == {
            name: told["shape"] for name, told in theirs.items()
        }
        for name, tensor in found.items():
            assert bytes(tensorfile.as_bytes(tensor)) == bytes(theirs[name]["data"])
    return end


def test_headers(tmp_path: Path) -> None:
    counted, path = Counted(), tmp_path / "x.safetensors"

    @fuzz(0.4)
    @given(cases(tensor_files(), mutated_files))
    @example(("mutated", b""))
    @example(("mutated", b"version https"))
    @example(("mutated", struct.pack("<Q", 2**64 - 1) + b"{}"))
    @example(("mutated", assembled({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}},
                                   b"1")))  # fmt: skip
    @example(("mutated", assembled({"a": {"dtype": "F32", "shape": [2**62, 2**62, 0],
                                          "data_offsets": [0, 0]}}, b"")))  # fmt: skip
    def run(case: tuple[Kind, bytes]) -> None:
        counted.note(case[0], check_file(path, *case))

    run()
    counted.check()


# --- shards and their index ------------------------------------------------------------------

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
NAMES = (("a", "b.weight"), ("c",))


@st.composite
def sharded(draw: st.DrawFn) -> tuple[Kind, dict[str, bytes]]:
    """A folder; in most one file is mutated."""
    files = {file: draw(tensor_files(names)) for file, names in zip(SHARDS, NAMES, strict=True)}
    weight_map = {n: file for file, names in zip(SHARDS, NAMES, strict=True) for n in names}
    index = {"metadata": {"total_size": 3}, "weight_map": weight_map}
    files[INDEX] = json.dumps(index).encode()
    kind = draw(st.sampled_from(["valid", *["mutated"] * 9]))
    if kind == "valid":
        return kind, files
    what = draw(st.sampled_from([INDEX, INDEX, INDEX, *SHARDS]))
    if what != INDEX:
        files[what] = draw(mutated_files(files[what]))
    elif draw(st.booleans()):
        files[what] = json.dumps(draw(mutated(index))).encode()
    else:
        files[what] = draw(mutated_bytes(files[what]))
    return kind, files


def test_indexes(tmp_path: Path) -> None:
    counted, folder = Counted(), tmp_path / "model"
    (tmp_path / "x.safetensors").write_bytes(assembled({}, b""))  # what paths upwards lead to

    @fuzz(0.25)
    @given(sharded())
    def run(case: tuple[Kind, dict[str, bytes]]) -> None:
        kind, files = case
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)

        def read() -> None:
            checkpoint = open_checkpoint(folder)
            for name, located in checkpoint.tensors.items():
                checkpoint.read(name)
                assert located.file.parent == folder

        with Allocations() as made:
            end = ended(read)
        assert made.largest <= sum(map(len, files.values()))
        assert end == "taken" or kind != "valid"
        counted.note(kind, end)

    run()
    counted.check()


# --- surgery.json ----------------------------------------------------------------------------


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def adapted() -> nn.Module:
    model = net()
    rule = surgery.Rule(surgery.LowRank(method="lora", rank=2), where=surgery.Path("**"))
    surgery.apply(model, rule)
    return model


def changed(document: Any, value: Any, *keys: Any) -> Any:
    """The document with another value in one place."""
    copy = deepcopy(document)
    holder = copy
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    return copy


def test_saved_folders(tmp_path: Path) -> None:
    counted = Counted()
    original = surgery.save(adapted(), tmp_path / "saved", max_shard_size=100)
    whole = json.loads((original / "surgery.json").read_text())
    del whole["checksum"]
    stock = net(1)
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    folder = tmp_path / "case"

    @fuzz(0.1)
    @given(st.one_of(mutated(whole), st.just(whole)))
    @example(changed(whole, "a", "record", "operations", 0, "edits"))
    @example(changed(whole, {"x" * 5000: whole["files"]["recipe.yaml"]}, "files"))
    @example(changed(whole, "system", "record", "operations", 0, "edits", 0, "adds",
                     "0.lowrank.default.lora_A", "dtype"))  # fmt: skip
    @example(changed(whole, True, "record", "operations", 0, "edits", 0, "payload", "places", 0, 3))
    def run(data: dict[str, Any]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        text = json.dumps({**data, "checksum": manifest.checksum(data)})  # as an attacker would
        (folder / "surgery.json").write_text(text)
        model = net(1)
        with Allocations() as made:
            end = ended(lambda: surgery.restore(folder, model))
        assert made.largest <= _SLACK
        if end != "taken":
            after = model.state_dict()
            assert list(after) == list(before)
            assert all(torch.equal(after[name], before[name]) for name in before)
        counted.note("valid" if data == whole else "mutated", end)

    run()
    counted.check()


# --- adapters of PEFT ------------------------------------------------------------------------

ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["0", "2"],
    "alpha_pattern": {"2": 8},
    "bias": "none",
    "use_rslora": False,
}


def test_adapters(tmp_path: Path) -> None:
    counted = Counted()
    entries = {
        f"base_model.model.{layer}.lora_{factor}.weight": list(shape)
        for layer, out in (("0", 4), ("2", 2))
        for factor, shape in (("A", (2, 4)), ("B", (out, 2)))
    }
    header, position = {}, 0
    for name, shape in entries.items():
        end = position + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    weights = assembled(header, bytes(position))
    config = json.dumps(ADAPTER).encode()

    @fuzz(0.1)
    @given(
        st.one_of(
            st.just((config, weights)),
            mutated(ADAPTER).map(lambda data: (json.dumps(data).encode(), weights)),
            mutated_bytes(config).map(lambda data: (data, weights)),
            mutated_files(weights).map(lambda data: (config, data)),
        )
    )
    @example((json.dumps(ADAPTER | {"x" * 5000: 1}).encode(), weights))
    def run(case: tuple[bytes, bytes]) -> None:
        (tmp_path / "adapter_config.json").write_bytes(case[0])
        (tmp_path / "adapter_model.safetensors").write_bytes(case[1])
        model = net()
        with Allocations() as made:
            end = ended(lambda: surgery.load_adapter(model, tmp_path))
        assert made.largest <= _SLACK
        assert end == "taken" or case != (config, weights)
        counted.note("valid" if case == (config, weights) else "mutated", end)

    run()
    counted.check()


# --- rule files and training configurations --------------------------------------------------


def documents(root: Path, folder: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((root / "configs" / folder).glob("*.yaml"))]


def test_rule_files(root: Path, tmp_path: Path) -> None:
    counted, path = Counted(), tmp_path / "rules.yaml"
    recipe = (
        b"version: 1\nrecipe: r\nseed: 0\nrules:\n  - id: a\n    pass: lowrank\n"
        b'    where: {path: ["0", "{2,3}"], type: Linear, shape: {in: ">=2"}}\n'
        b"    with: {method: lora, rank: 2, alpha: 4}\n"
    )
    valid = st.sampled_from([recipe, recipe, *documents(root, "rules")])

    def plan() -> None:
        surgery.plan(net(), Recipe.load(path))

    @fuzz(0.1)
    @given(cases(valid, mutated_bytes))
    def run(case: tuple[Kind, bytes]) -> None:
        kind, data = case
        path.write_bytes(data)
        with Allocations() as made:
            end = ended(plan)
        assert made.largest <= _SLACK
        assert end == "taken" or data != recipe
        counted.note(kind, end)

    run()
    counted.check()


def test_training_configurations(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "configs" / "rules", tmp_path / "rules")
    (tmp_path / "runs").mkdir()
    counted, path = Counted(), tmp_path / "runs" / "config.yaml"
    sections = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
    valid = [(kind, data) for name, kind in sections.items() for data in documents(root, name)]

    @fuzz(0.05)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        section, text = data.draw(st.sampled_from(valid))
        kind, content = data.draw(cases(st.just(text), mutated_bytes))
        path.write_bytes(content)
        end = ended(lambda: section.load(path))
        assert end == "taken" or kind != "valid"
        counted.note(kind, end)

    run()
    counted.check()


# --- conversions, which write ----------------------------------------------------------------


@pytest.mark.skipif(CASES < 1000, reason="make fuzz: it imports transformers")
def test_conversions(tmp_path: Path) -> None:
    from tests import zoo

    counted, original, source = Counted(), tmp_path / "original", tmp_path / "source"
    model: Any = zoo.build("llama")[0]
    model.save_pretrained(original, max_shard_size="40KB")
    whole = {path.name: path.read_bytes() for path in original.iterdir()}
    shards = [name for name in whole if name.endswith(".safetensors")]
    rules = b"version: 1\nrecipe: r\nrules:\n  - pass: lowrank\n    where: {role: attention.q}\n"
    (index,) = (name for name in whole if name.endswith(".index.json"))
    work, recipe = tmp_path / "work", tmp_path / "rules.yaml"

    def convert() -> None:
        surgery.convert(source, Recipe.load(recipe), work / "out", threads=1)

    def prepare(name: str, data: bytes) -> dict[str, bytes]:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(original, source)
        work.mkdir()
        (recipe if name == recipe.name else source / name).write_bytes(data)
        return {path.name: path.read_bytes() for path in source.iterdir()}

    prepare(recipe.name, rules)
    convert()  # what is imported and cached is so before the watch begins

    @fuzz(0.02)
    @given(
        st.one_of(
            st.just((recipe.name, rules)),
            mutated_bytes(rules).map(lambda data: (recipe.name, data)),
            mutated(json.loads(whole[index])).map(lambda data: (index, json.dumps(data).encode())),
            *(
                mutated_files(whole[name]).map(lambda data, name=name: (name, data))
                for name in shards[:2]
            ),
        )
    )
    def run(case: tuple[str, bytes]) -> None:
        recipe.write_bytes(rules)
        before = prepare(*case)
        end = ended(convert, allowed=work)
        assert {path.name: path.read_bytes() for path in source.iterdir()} == before
        assert (work / "out").exists() == (end == "taken")
        counted.note("valid" if case == (recipe.name, rules) else "mutated", end)

    run()
    counted.check()
