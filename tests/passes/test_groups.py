"""Parameter groups of LoRA+: which parameter learns how fast, and what PEFT says of the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import LowRank, Path, Role, Rule, Shortcuts, adapters
from surgery.errors import ModelStateError
from tests import zoo
from tests.passes.layers import build


class Net(nn.Module):
    """An embedding, two layers and a head that is trained as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.first = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(self.embed(x))))


def adapted(method: str = "lora") -> Net:
    net = Net()
    where = Path("{embed,first}") if method != "dora" else Path("first")
    surgery.apply(net, Rule(LowRank(method=method, rank=2), where=where))
    net.head.requires_grad_(True)
    return net


def names_of(net: nn.Module, groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    names = {id(p): name for name, p in net.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}


def test_every_trainable_parameter_is_in_the_group_that_lora_plus_has_for_it():
    net = adapted()
    groups = adapters.parameter_groups(net, lr=1e-3, ratio=16, weight_decay=0.1)
    assert names_of(net, groups) == {
        "A": ["first.lowrank.default.lora_A", "head.weight"],
        "embedding": ["embed.lowrank.default.lora_A", "embed.lowrank.default.lora_B"],
        "B": ["first.lowrank.default.lora_B"],
        "B, no decay": ["head.bias"],
    }
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "A": (1e-3, 0.1),
        "embedding": (1e-6, 0.1),
        "B": (1.6e-2, 0.1),
        "B, no decay": (1.6e-2, 0.0),
    }
    trained = [p for group in groups for p in group["params"]]
    assert len(trained) == len({id(p) for p in trained})
    assert {id(p) for p in trained} == {id(p) for p in net.parameters() if p.requires_grad}


def test_the_groups_are_those_of_peft():
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    config = LoraConfig(r=2, target_modules=["embed", "first"], modules_to_save=["head"])
    theirs = get_peft_model(Net(), config)
    wanted = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16,
        loraplus_weight_decay=0.1,
    )
    groups = adapters.parameter_groups(adapted(), lr=1e-3, ratio=16, weight_decay=0.1)

    def summary(found: list[dict[str, Any]]) -> list[tuple[float, float, list[int]]]:
        return sorted(
            (group["lr"], group["weight_decay"], sorted(p.numel() for p in group["params"]))
            for group in found
        )

    assert summary(groups) == summary(wanted.param_groups)


def test_a_magnitude_goes_with_b_and_is_not_decayed():
    net = adapted("dora")
    groups = adapters.parameter_groups(net, lr=1e-3, ratio=4, weight_decay=0.1)
    found = names_of(net, groups)
    assert "first.lowrank.default.lora_magnitude_vector" in found["B, no decay"]


def test_factors_of_slices_and_of_experts_are_found():
    model = surgery.load(
        "timm:vit_tiny_patch16_224",
        config={"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32, "num_classes": 5},
    )
    rule = Rule(LowRank(rank=2, slices=("q", "v")), where=Role("attention.qkv"))
    surgery.apply(model, rule)
    groups = {g["name"]: g["params"] for g in adapters.parameter_groups(model, lr=1, ratio=2)}
    assert [tuple(p.shape) for p in groups["A"]] == [(2, 24)] * 2
    assert [tuple(p.shape) for p in groups["B"]] == [(24, 2)] * 2

    experts, _ = build("experts")
    surgery.apply(experts, Rule(LowRank(rank=2)))
    groups = {g["name"]: g["params"] for g in adapters.parameter_groups(experts, lr=1, ratio=2)}
    assert [tuple(p.shape) for p in groups["A"]] == [(3, 2, 6), (3, 2, 8)]
    assert [tuple(p.shape) for p in groups["B"]] == [(3, 8, 2), (3, 6, 2)]


def test_coefficients_of_shortcuts_learn_like_a_and_are_not_decayed():
    model, _ = zoo.build("bert")
    surgery.apply(model, [Rule(Shortcuts()), Rule(LowRank(rank=2), where=Role("attention.q"))])
    groups = adapters.parameter_groups(model, lr=1e-3, ratio=16, weight_decay=0.1)
    (own,) = [group for group in groups if group["name"] == "coefficients"]
    assert (own["lr"], own["weight_decay"]) == (1e-3, 0.0)
    assert own["params"]


def test_an_optimizer_trains_b_faster():
    torch.manual_seed(0)
    net = adapted()
    optimizer = torch.optim.SGD(adapters.parameter_groups(net, lr=1e-2, ratio=8))
    with torch.no_grad():
        net.first.lowrank.default.lora_B.normal_()
    before = [p.detach().clone() for p in adapters.parameters(net)]
    net(torch.arange(10)).square().sum().backward()
    optimizer.step()
    rates = [
        ((old - new) / new.grad).nanmean().item()
        for old, new in zip(before, adapters.parameters(net), strict=True)
    ]
    names = [name.rpartition(".")[2] for name, _ in net.named_parameters() if "lowrank" in name]
    of_layer = dict(zip(names[2:], rates[2:], strict=True))
    assert of_layer["lora_A"] == pytest.approx(1e-2, rel=1e-3)
    assert of_layer["lora_B"] == pytest.approx(8e-2, rel=1e-3)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ModelStateError, match="has no adapters") as caught:
        adapters.parameter_groups(Net(), lr=1e-3, ratio=16)
    assert "surgery.parameter_groups" in caught.value.hint


def test_a_model_in_which_nothing_is_trained_is_refused():
    net = adapted().requires_grad_(False)
    with pytest.raises(ModelStateError, match="nothing to train"):
        adapters.parameter_groups(net, lr=1e-3, ratio=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be a positive number, got 0.0"),
        ({"ratio": -1.0}, "ratio must be a positive number"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"lr_embedding": float("nan")}, "lr_embedding must be 0 or more, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        adapters.parameter_groups(adapted(), **{"lr": 1e-3, "ratio": 16, **options})
