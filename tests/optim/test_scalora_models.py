"""ScaLoRA on models: every host, undo, saving, and what it is refused on."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import surgery
from surgery import LowRank, Path, Role, Rule, adapters
from surgery.errors import CheckpointError, Conflict, ModelStateError, RuleError
from tests import zoo
from tests.passes.layers import KINDS, build

READABLE = [name for name in KINDS if name != "parametrised"]


def adapt(model: nn.Module, **options: Any) -> None:
    surgery.apply(model, Rule(LowRank(**{"method": "scalora", "rank": 2, **options})))


def optimizer_of(model: nn.Module, lr: float = 1e-2) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(adapters.parameters(model), lr=lr, weight_decay=0.0)
    (rule,) = adapters.prepare(model, optimizer).rules
    return optimizer, rule


def train(model: nn.Module, x: Tensor, steps: int = 3, lr: float = 1e-2) -> Any:
    optimizer, rule = optimizer_of(model, lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return rule


def stock(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "lowrank" not in n}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(5, 6)


@pytest.mark.parametrize("kind", READABLE)
def test_a_swap_changes_the_weight_and_not_the_output(kind: str):
    module, x = build(kind, torch.float64)
    before = stock(module)
    adapt(module, alpha=3.0)
    with torch.no_grad():
        for tensor in adapters.parameters(module):
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
    optimizer, rule = optimizer_of(module)
    output = module(x)
    output.square().sum().backward()
    rule.before(optimizer)
    # Float64, and weights whose parts may be a few times as large as they.
    torch.testing.assert_close(module(x), output, rtol=1e-11, atol=1e-11)
    changed = [
        name for name, tensor in stock(module).items() if not torch.equal(tensor, before[name])
    ]
    assert len(changed) == (len(KINDS[kind].hosts) if x.numel() else 0)
    surgery.undo(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock(module).items())


def test_slices_of_a_fused_weight_fold_into_their_rows():
    model = surgery.load(
        "timm:vit_tiny_patch16_224",
        config={"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32, "num_classes": 5},
    ).double()
    surgery.apply(
        model,
        Rule(LowRank(method="scalora", rank=2, slices=("q", "v")), where=Role("attention.qkv")),
    )
    weight = model.blocks[0].attn.qkv.weight.detach()
    before = weight.clone()
    train(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    same = (weight == before).all(-1)
    assert same[24:48].all()  # the rows of k
    assert not same[:24].any()
    assert not same[48:].any()
    surgery.undo(model)
    assert torch.equal(model.blocks[0].attn.qkv.weight, before)


def test_the_plan_says_that_training_changes_the_weight():
    model, _ = net()
    rule = LowRank(method="scalora", rank=2)
    kept = surgery.plan(model, Rule(rule))
    assert all("training changes the weight" in edit.summary for edit in kept.edits)
    assert kept.contract.kind == "exact"
    lasting = surgery.plan(model, Rule(replace(rule, keep_base="none")))
    assert all("changes the weight for good" in edit.summary for edit in lasting.edits)
    lasting.apply()
    with pytest.raises(ModelStateError, match="for good"):
        surgery.undo(model)


def test_saved_in_training_restored_and_trained_on_it_has_the_same_bits(tmp_path: FilePath):
    model, x = net()
    before = stock(model)
    adapt(model)
    optimizer, _ = optimizer_of(model)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step(model, optimizer)
    folder = surgery.save(model, tmp_path / "saved")
    state = copy.deepcopy(optimizer.state_dict())
    again = surgery.restore(folder, model=Net())
    resumed, rule = optimizer_of(again)
    resumed.load_state_dict(state)
    assert rule.steps == 3
    for _ in range(3):
        step(model, optimizer)
        step(again, resumed)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for each in (model, again):
        surgery.undo(each)
        assert all(torch.equal(tensor, before[name]) for name, tensor in stock(each).items())


def test_what_was_trained_cannot_be_saved_without_its_weight(tmp_path: FilePath):
    model, x = net()
    adapt(model)
    surgery.save(model, tmp_path / "before", adapter_only=True)  # nothing has changed yet
    train(model, x)
    with pytest.raises(CheckpointError, match="of no use beside the original weight") as caught:
        surgery.save(model, tmp_path / "after", adapter_only=True)
    assert "save the whole model" in caught.value.hint


def test_an_adapter_restored_alone_is_trained_and_undone(tmp_path: FilePath):
    model, x = net()
    plain = copy.deepcopy(model)
    adapt(model)
    folder = surgery.save(model, tmp_path / "alone", adapter_only=True)
    again = surgery.restore(folder, model=plain)
    before = stock(again)
    train(again, x)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in stock(again).items())
    surgery.undo(again)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock(again).items())


def test_what_was_trained_cannot_be_switched_off_or_mixed():
    model, x = net()
    adapt(model)
    with adapters.disabled(model):
        model(x)
    train(model, x)
    for attempt in (
        lambda: adapters.activate(model, {"default": 0.5}),
        lambda: adapters.disabled(model).__enter__(),
        lambda: adapters.merge(model, {"default": 0.5}),
    ):
        with pytest.raises(ModelStateError, match="added to the weights while it was trained"):
            attempt()
    with pytest.raises(ModelStateError, match="has no low rank"):
        adapters.to_lora(model)
    adapters.activate(model, "default")
    output = model(x)
    adapters.merge(model)
    torch.testing.assert_close(model(x), output)
    with pytest.raises(ModelStateError, match="merged"):
        optimizer_of(model)
    adapters.unmerge(model)


def test_an_adapter_that_counts_in_part_does_not_fold():
    model, x = net()
    adapt(model)
    optimizer, _ = optimizer_of(model)
    with torch.no_grad():
        for tensor in adapters.parameters(model):
            tensor.normal_()
    adapters.activate(model, {"default": 0.5})
    before = stock(model)
    model(x).square().mean().backward()
    with pytest.raises(ModelStateError, match=r"counts 0\.5 times at first\.weight"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock(model).items())


def test_the_weight_is_copied_when_it_first_changes_and_only_then():
    model, x = net()
    adapt(model)
    (operation,) = surgery.record.record_of(model).operations
    assert operation.kept == {}
    train(model, x, steps=1)  # B is zero
    assert operation.kept == {}
    train(model, x, steps=1)
    assert operation.kept.keys() == {"first.weight", "second.weight"}


def test_an_application_keeps_its_own_copy():
    model, x = net()
    before = stock(model)
    adapt(model, method="lora", keep_base="none", adapter="other")
    adapt(model)
    train(model, x)
    surgery.undo(model, last=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock(model).items())


def test_the_original_weight_can_be_read_again_from_the_source(tmp_path: FilePath):
    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    surgery.load("transformers:LlamaModel", config=config).save_pretrained(tmp_path / "stock")
    model = surgery.load(tmp_path / "stock")
    before = stock(model)
    rule = LowRank(method="scalora", rank=2, keep_base="source")
    surgery.apply(model, Rule(rule, where=Path("**.q_proj")))
    optimizer, _ = optimizer_of(model)
    for _ in range(3):
        model(input_ids=torch.arange(8)[None]).last_hidden_state[:, -1].sum().backward()
        optimizer.step()
    assert not torch.equal(
        model.layers[0].self_attn.q_proj.weight, before["layers.0.self_attn.q_proj.weight"]
    )
    assert not any(each.kept for each in surgery.record.record_of(model).operations)
    surgery.undo(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock(model).items())


def _quantised() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, _ = net()
    quantize_(model, Int8WeightOnlyConfig())
    return model


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    return model


def _with(method: str) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model, _ = net()
        adapt(model, method=method, adapter="other")
        return model

    return made


@pytest.mark.parametrize(
    ("make", "method", "error", "message"),
    [
        (_quantised, "scalora", RuleError, "changes the weight, and that of first is quantised"),
        (
            _tied,
            "scalora",
            RuleError,
            "adds to the weight while it is trained, and 0 and 1 share one",
        ),
        (_with("scalora"), "scalora", Conflict, "adds to the weight of first, which another"),
        (_with("scalora"), "dora", Conflict, "measures the norms of the rows"),
        (_with("dora"), "scalora", Conflict, "measures the norms of its rows"),
    ],
    ids=["quantised", "tied", "two that fold", "dora beside it", "beside dora"],
)
def test_a_base_that_cannot_take_part_is_refused_with_the_reason(
    make: Callable[[], nn.Module], method: str, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        surgery.plan(make(), Rule(LowRank(method=method, rank=2)))


def test_a_tied_weight_of_a_language_model_is_refused():
    model, _ = zoo.build("gpt2")
    with pytest.raises(RuleError, match="share one"):
        surgery.plan(model, Rule(LowRank(method="scalora", rank=2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval must be at least 1"),
        ({"lipschitz": -1.0}, "lipschitz must be a positive number"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"lipshitz": 1.0}, "did you mean 'lipschitz'"),
        ({"interval": "often"}, "interval"),
    ],
)
def test_options_are_checked_when_a_rule_is_read(options: dict[str, Any], message: str):
    with pytest.raises(RuleError, match=message):
        Rule(LowRank(method="scalora", options=options))


def test_options_reach_the_rule():
    model, _ = net()
    adapt(model, options={"interval": 10, "lipschitz": 30.0, "warmup": 5})
    _, rule = optimizer_of(model)
    assert (rule.interval, rule.lipschitz, rule.warmup) == (10, 30.0, 5)


def _rank(rank: int, port: int) -> None:
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    xs = torch.randn(2, 4, 6)
    alone, together = Net(), Net()
    together.load_state_dict(alone.state_dict())
    adapt(alone)
    adapt(together)
    train(alone, xs.reshape(8, 6), steps=6)
    wrapped = DistributedDataParallel(together)
    optimizer = torch.optim.AdamW(adapters.parameters(together), lr=1e-2, weight_decay=0.0)
    adapters.prepare(wrapped, optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        wrapped(xs[rank]).square().mean().backward()
        optimizer.step()
    for (name, one), other in zip(
        together.state_dict().items(), alone.state_dict().values(), strict=True
    ):
        # Rounding of a mean over two halves, through six steps of Adam.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
        found = [torch.empty_like(one) for _ in range(2)]
        dist.all_gather(found, one)
        assert torch.equal(found[0], found[1]), name

    sharded, _ = net()
    adapt(sharded)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(adapters.parameters(sharded), lr=1e-2)
    with pytest.raises(ModelStateError, match="sharded"):
        adapters.prepare(sharded, optimizer)
    dist.destroy_process_group()


def test_ranks_agree_in_every_bit_and_a_sharded_base_is_refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, (port,), nprocs=2)
