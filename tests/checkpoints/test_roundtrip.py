"""What save wrote, restore gives back: bit for bit, flags, ties, buffers and undo included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path as FilePath
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import surgery
from surgery import LowRank, Path, Rule, adapters, progress
from surgery.errors import CheckpointError, ModelStateError
from surgery.progress import Task
from surgery.record import record_of
from surgery.sources import Example
from surgery.verification.outputs import compare, leaves
from tests import zoo
from tests.verify.rewrites import Graft, Round

MODELS = [
    "llama",
    "gpt2",
    "t5",
    "mixtral",
    "whisper",
    "timm_swin",
    "timm_efficientnet",
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
]


def call(model: nn.Module, example: Example) -> dict[str, Any]:
    with torch.no_grad():
        return leaves(model(*example.args, **example.kwargs))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return compare(one, other, rtol=0.0, atol=0.0).equal


def train(model: nn.Module) -> None:
    """Give every adapter other values."""
    with torch.no_grad():
        for parameter in adapters.parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def rewritten(name: str, **options: Any) -> tuple[nn.Module, Example]:
    model, example = zoo.build(name)
    surgery.apply(model, Rule(LowRank(rank=2, **options)))
    train(model)
    return model, example


@pytest.mark.parametrize("name", MODELS)
def test_restored_without_the_original_weights(name: str, tmp_path: FilePath) -> None:
    model, example = zoo.build(name)
    stock = call(model, example)
    surgery.apply(model, Rule(LowRank(rank=2)))
    train(model)
    before = call(model, example)
    assert not same(stock, before)
    surgery.save(model, tmp_path / "out")
    restored = surgery.restore(tmp_path / "out")
    assert type(restored) is type(model)
    assert same(before, call(restored, example))
    assert list(restored.state_dict()) == list(model.state_dict())
    one, other = dict(model.named_buffers()), dict(restored.named_buffers())
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in restored.named_parameters()}
    assert same(stock, call(surgery.undo(restored), example))


def test_the_folder(tmp_path: FilePath) -> None:
    model, _ = rewritten("bert")
    written = surgery.save(model, tmp_path / "out")
    assert written == tmp_path / "out"
    assert {each.name for each in written.iterdir()} == {
        "surgery.json",
        "recipe.yaml",
        "model.safetensors",
        "buffers.safetensors",
    }
    data = json.loads((written / "surgery.json").read_text())
    assert data["format"] == 1
    assert {"surgery", "torch", "transformers"} == set(data["versions"])
    assert data["source"]["class"] == "transformers.models.bert.modeling_bert.BertModel"
    assert data["record"]["operations"][0]["edits"][0]["summary"].startswith("lora r=2")
    recipe = surgery.Recipe.load(written / "recipe.yaml")
    assert recipe.rules[0].options == LowRank(rank=2)
    # Any safetensors reader can open the weights.
    tensors = safetensors.torch.load_file(written / "model.safetensors")
    state = model.state_dict()
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_sharded_in_the_format_of_the_hub(tmp_path: FilePath) -> None:
    model, example = rewritten("bert")
    folder = surgery.save(model, tmp_path / "out", max_shard_size="40KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    sizes = {name: t.numel() * t.element_size() for name, t in model.state_dict().items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for shard in shards:
        tensors = safetensors.torch.load_file(folder / shard)
        assert set(tensors) == {n for n, file in index["weight_map"].items() if file == shard}
        assert sum(sizes[name] for name in tensors) <= 40_000 or len(tensors) == 1
    assert same(call(model, example), call(surgery.restore(folder), example))


@pytest.mark.parametrize("size", ["0", "-1", "5 gigs", "GB", 0, "1e3MB"])
def test_a_shard_size_that_is_none(size: Any, tmp_path: FilePath) -> None:
    with pytest.raises(CheckpointError, match=r"max_shard_size is .*expected a number of bytes"):
        surgery.save(nn.Linear(2, 2), tmp_path / "out", max_shard_size=size)
    assert not any(tmp_path.iterdir())


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: FilePath) -> None:
    model, example = rewritten("gpt2")
    folder = surgery.save(model, tmp_path / "out")
    data = json.loads((folder / "surgery.json").read_text())
    assert data["ties"]["lm_head.weight"] == "transformer.wte.weight"
    assert "lm_head.weight" not in safetensors.torch.load_file(folder / "model.safetensors")
    restored = surgery.restore(folder)
    assert restored.lm_head.weight is restored.transformer.wte.weight
    assert restored.lm_head.lowrank is restored.transformer.wte.lowrank
    assert same(call(model, example), call(restored, example))


def test_a_tie_that_was_cut_stays_cut(tmp_path: FilePath) -> None:
    model, example = zoo.build("gpt2")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    surgery.apply(model, Rule(LowRank(rank=2), where=Path("**.c_attn")))
    restored = surgery.restore(surgery.save(model, tmp_path / "out"))
    assert restored.lm_head.weight is not restored.transformer.wte.weight
    assert same(call(model, example), call(restored, example))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: FilePath) -> None:
    model, example = zoo.build("llama")
    model.to(dtype)
    surgery.apply(model, Rule(LowRank(rank=2, dtype="float32"), where=Path("**.q_proj")))
    train(model)
    restored = surgery.restore(surgery.save(model, tmp_path / "out"))
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {name: p.dtype for name, p in restored.named_parameters()} == kinds
    assert set(kinds.values()) == {dtype, torch.float32}
    assert same(call(model, example), call(restored, example))


def test_flags_survive(tmp_path: FilePath) -> None:
    model, _ = rewritten("bert", freeze="none")
    model.train()
    model.encoder.layer[1].eval()
    model.embeddings.word_embeddings.weight.requires_grad_(False)
    restored = surgery.restore(surgery.save(model, tmp_path / "out"))
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes == {name: module.training for name, module in restored.named_modules()}
    assert not restored.embeddings.word_embeddings.weight.requires_grad
    assert restored.pooler.dense.weight.requires_grad


def test_the_edit_log_survives(tmp_path: FilePath) -> None:
    model, _ = rewritten("bert")
    surgery.apply(model, Rule(LowRank(rank=3, adapter="second"), where=Path("**.query")))
    folder = surgery.save(model, tmp_path / "out")
    assert surgery.Recipe.load(folder / "recipe-2.yaml").rules[0].options.rank == 3
    restored = surgery.restore(folder)
    assert record_of(restored).to_dict() == record_of(model).to_dict()
    surgery.undo(restored, last=1)
    assert adapters.names(restored) == ("default",)


def test_what_is_active_survives(tmp_path: FilePath) -> None:
    model, example = rewritten("bert")
    surgery.apply(model, Rule(LowRank(rank=2, adapter="second"), where=Path("**.query")))
    train(model)
    adapters.activate(model, {"default": 0.25, "second": 2.0})
    restored = surgery.restore(surgery.save(model, tmp_path / "out"))
    assert adapters.active(restored) == {"default": 0.25, "second": 2.0}
    assert same(call(model, example), call(restored, example))


def test_merged_adapters_survive_and_come_out_again(tmp_path: FilePath) -> None:
    model, example = zoo.build("bert")
    stock = call(model, example)
    surgery.apply(model, Rule(LowRank(rank=2)))
    train(model)
    apart = call(model, example)
    adapters.merge(model)
    merged = call(model, example)
    restored = surgery.restore(surgery.save(model, tmp_path / "out"))
    assert same(merged, call(restored, example))
    assert adapters.merged(restored) == {"default": 1.0}
    adapters.unmerge(restored)
    assert same(apart, call(restored, example))
    assert same(stock, call(surgery.undo(restored), example))


def test_kept_weights_let_undo_work_after_restore(tmp_path: FilePath) -> None:
    model, example = zoo.build("bert")
    stock = call(model, example)
    surgery.apply(model, Rule(Round(), where=Path("**.query")))
    folder = surgery.save(model, tmp_path / "out")
    kept = safetensors.torch.load_file(folder / "kept.safetensors")
    assert next(iter(kept)).startswith("0/encoder.layer.")
    restored = surgery.restore(folder)
    assert same(call(model, example), call(restored, example))
    assert not same(stock, call(restored, example))
    assert same(stock, call(surgery.undo(restored), example))


def test_a_generation_config_survives(tmp_path: FilePath) -> None:
    model, example = rewritten("llama")
    model.generation_config.max_new_tokens = 3
    model.generation_config.num_beams = 2
    restored = surgery.restore(surgery.save(model, tmp_path / "out"))
    assert restored.generation_config.to_dict() == model.generation_config.to_dict()
    ids = example.kwargs["input_ids"]
    assert torch.equal(model.generate(ids), restored.generate(ids))


def test_a_model_without_rewrites_can_be_saved(tmp_path: FilePath) -> None:
    model, example = zoo.build("timm_vit")
    folder = surgery.save(model, tmp_path / "out")
    assert not (folder / "recipe.yaml").exists()
    restored = surgery.restore(folder)
    assert record_of(restored) is None
    assert same(call(model, example), call(restored, example))


class Own(nn.Module):
    """A class of the user's own, with a buffer that no state dict holds and one in odd order."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.conv = nn.Conv2d(2, 2, 3)
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.register_buffer("mask", torch.ones(3, 3).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu() * self.scale
        return self.conv(x.reshape(1, 2, 4, -1))


def own(**sizes: int) -> Own:
    model = Own(**sizes)
    zoo.perturb(model).eval()
    model.scale.fill_(1.5)
    return model


X = Example((torch.randn(8, 8, generator=torch.Generator().manual_seed(3)),))


def test_a_class_of_the_users_own(tmp_path: FilePath) -> None:
    model = own()
    model.conv.to(memory_format=torch.channels_last)
    surgery.apply(model, Rule(LowRank(rank=2)))
    train(model)
    folder = surgery.save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"does not say how to build its .*\.Own") as info:
        surgery.restore(folder)
    assert "restore(folder, model=...)" in info.value.hint
    fresh = Own()
    ids = {name: id(p) for name, p in fresh.named_parameters()}
    restored = surgery.restore(folder, model=fresh)
    assert restored is fresh
    assert {name: id(p) for name, p in fresh.named_parameters() if name in ids} == ids
    assert restored.scale == 1.5
    assert restored.conv.weight.stride() == model.conv.weight.stride()
    assert same(call(model, X), call(restored, X))


def test_a_class_of_the_users_own_built_on_meta(tmp_path: FilePath) -> None:
    model = own()
    surgery.apply(model, Rule(Graft()))
    folder = surgery.save(model, tmp_path / "out")
    with torch.device("meta"):
        fresh = Own()
    restored = surgery.restore(folder, model=fresh)
    assert {p.device.type for p in restored.parameters()} == {"cpu"}
    assert same(call(model, X), call(restored, X))
    assert surgery.undo(restored) is restored


def test_the_dtype_is_the_saved_one(tmp_path: FilePath) -> None:
    model = own().to(torch.float64)
    restored = surgery.restore(surgery.save(model, tmp_path / "out"), model=Own())
    assert restored.layers[0].weight.dtype == torch.float64
    assert torch.equal(restored.layers[0].weight, model.layers[0].weight)


def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path: FilePath) -> None:
    model = own()
    surgery.apply(model, Rule(LowRank(rank=2)))
    folder = surgery.save(model, tmp_path / "out")
    other = own(depth=2)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"the model has no layers\.2\.") as info:
        surgery.restore(folder, model=other)
    assert "another number of layers" in info.value.hint
    with pytest.raises(CheckpointError, match=r"the folder has no layers\.3\."):
        surgery.restore(folder, model=own(depth=4))
    with pytest.raises(CheckpointError, match=r"layers\.0\.weight with shape \(8, 8\), .*\(6, 6\)"):
        surgery.restore(folder, model=own(width=6))
    after = other.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert record_of(other) is None


def test_a_pass_that_cannot_be_repeated_leaves_the_model_as_it_was(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own()
    surgery.apply(model, [Rule(Graft(), id="a"), Rule(Graft(mixin="Louder", adds=None), id="b")])
    folder = surgery.save(model, tmp_path / "out")

    def fail(*_: Any) -> None:
        raise KeyError("layers.2")

    other = own()
    monkeypatch.setattr("tests.verify.rewrites.graft", fail)
    with pytest.raises(CheckpointError, match="the saved edits do not fit this Own"):
        surgery.restore(folder, model=other)
    assert record_of(other) is None
    assert list(other.state_dict()) == list(own().state_dict())


def test_a_rewritten_model_is_not_restored_onto(tmp_path: FilePath) -> None:
    model = own()
    surgery.apply(model, Rule(Graft()))
    folder = surgery.save(model, tmp_path / "out")
    with pytest.raises(ModelStateError, match="rewritten already"):
        surgery.restore(folder, model=model)


def test_weights_with_nan_are_kept_and_verify_says_where(tmp_path: FilePath) -> None:
    model = own()
    surgery.apply(model, Rule(Graft()))
    with torch.no_grad():
        model.layers[1].weight[2, 5] = torch.nan
    restored = surgery.restore(surgery.save(model, tmp_path / "out"), model=Own())
    (row, *_) = [r for r in surgery.verify(restored, X).broken if r.check == "finite weights"]
    assert row.where == "layers.1.weight"
    assert "first at [2, 5]" in row.detail


def test_a_restored_model_is_verified_like_the_saved_one(tmp_path: FilePath) -> None:
    model, example = zoo.build("llama")
    surgery.apply(model, Rule(LowRank(rank=2)))
    restored = surgery.restore(surgery.save(model, tmp_path / "out"))
    report = surgery.verify(restored, example)
    assert report.ok
    assert not report.drifted


def test_restored_on_meta_is_structure_only(tmp_path: FilePath) -> None:
    model, _ = rewritten("llama")
    restored = surgery.restore(surgery.save(model, tmp_path / "out"), device="meta")
    assert {p.device.type for p in restored.parameters()} == {"meta"}
    assert list(restored.state_dict()) == list(model.state_dict())


def test_saved_again_it_is_the_same_folder(tmp_path: FilePath) -> None:
    model, _ = rewritten("gpt2")
    # transformers notes the dtype in the config of a model that it did not build by hand.
    first = surgery.save(model, tmp_path / "first")
    one = surgery.save(surgery.restore(first), tmp_path / "one")
    two = surgery.save(surgery.restore(one), tmp_path / "two")
    assert {each.name for each in one.iterdir()} == {each.name for each in two.iterdir()}
    for each in one.iterdir():
        assert each.read_bytes() == (two / each.name).read_bytes(), each.name


def test_progress_comes_to_its_end(tmp_path: FilePath) -> None:
    class Listener:
        def __init__(self) -> None:
            self.tasks: list[Task] = []

        def started(self, task: Task) -> None:
            self.tasks.append(task)

        def advanced(self, task: Task) -> None:
            assert task.total is None or task.done <= task.total

        def finished(self, task: Task) -> None:
            assert task.total is None or task.done == task.total, task.title

    listener = Listener()
    model, _ = rewritten("gpt2")
    with progress.listen(listener):
        surgery.restore(surgery.save(model, tmp_path / "whole"))
        folder = surgery.save(model, tmp_path / "adapter", adapter_only=True)
        surgery.restore(folder, model=zoo.build("gpt2")[0])
    titles = [task.title for task in listener.tasks]
    assert titles[:3] == ["saving", "checking files", "loading"]
    assert "hashing stock weights" in titles


class Odd(nn.Module):
    def __init__(self, tensor: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("odd", tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"amax": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Odd(torch.ones(2, device="meta")), "odd is on the meta device"),
        (Odd(torch.ones(2, 2).to_sparse()), "odd is sparse"),
        (Odd(torch.ones(2, dtype=torch.complex128)), "odd has dtype torch.complex128"),
        (nn.Sequential(Extra(2, 2)), r"0 \(Extra\) keeps state that is no tensor"),
    ],
)
def test_what_cannot_be_saved(model: nn.Module, said: str, tmp_path: FilePath) -> None:
    with pytest.raises(CheckpointError, match=said):
        surgery.save(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(7),
        torch.ones(0, 3),
        torch.ones(2, 3).t(),
        torch.arange(4).expand(3, 4),
        torch.randn(3).to(torch.float8_e4m3fn),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.tensor([True, False]),
        torch.tensor([1, 2], dtype=torch.uint16),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
)
def test_odd_tensors(tensor: Tensor, tmp_path: FilePath) -> None:
    folder = surgery.save(Odd(tensor), tmp_path / "out")
    restored = surgery.restore(folder, model=Odd(torch.zeros_like(tensor)))
    assert restored.odd.dtype == tensor.dtype
    assert restored.odd.tolist() == tensor.tolist()


def test_a_wrapper_is_refused_with_what_to_save(tmp_path: FilePath) -> None:
    model = own()
    surgery.apply(model, Rule(Graft()))
    with pytest.raises(ModelStateError, match="the rewritten model is 'module' inside") as info:
        surgery.save(nn.DataParallel(model), tmp_path / "out")
    assert "surgery.save(model.module, folder)" in info.value.hint


PEAK = """
import resource, sys
from torch import nn
import surgery

model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(48)))  # 192 MiB
surgery.save(nn.Linear(2, 2), sys.argv[1] + "/warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
surgery.save(model, sys.argv[1] + "/out", max_shard_size="1GB")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_saving_holds_no_second_copy(tmp_path: FilePath, root: FilePath) -> None:
    """The peak of a process of its own, as the kernel measures it, hardly moves."""
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    assert int(done.stdout) < 32 << 20
