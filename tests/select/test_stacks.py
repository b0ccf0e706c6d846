"""What is a stack of layers and what is not, from the module tree alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from surgery.select import ModelMap
from surgery.select.stacks import find_stacks
from tests import zoo

ZOO: dict[str, dict[str, int]] = {
    "llama": {"model.layers": 4},
    "gpt2": {"transformer.h": 3},
    "bert": {"encoder.layer": 3},
    "t5": {"encoder.block": 3, "decoder.block": 3},
    "mixtral": {"model.layers": 3},
    "whisper": {"model.encoder.layers": 3, "model.decoder.layers": 3},
    "SD3Transformer2DModel": {"transformer_blocks": 3},
    "FluxTransformer2DModel": {"transformer_blocks": 2, "single_transformer_blocks": 2},
    "timm_vit": {"blocks": 3},
    "timm_swin": {"layers.0.blocks": 2, "layers.1.blocks": 2},
    "timm_convnext": {f"stages.{stage}.blocks": 3 if stage == 2 else 1 for stage in range(4)},
    "timm_resnet": {"layer1": 2, "layer2": 2},
    "timm_efficientnet": {f"blocks.{stage}": 2 for stage in range(5)},
}


@pytest.mark.parametrize("name", ZOO)
def test_stacks_of_the_zoo(name: str):
    model, _ = zoo.build(name)
    assert {stack.path: len(stack) for stack in find_stacks(model)} == ZOO[name]


def test_a_unets_lists_of_levels_are_no_stack_but_their_blocks_are():
    model, _ = zoo.build("UNet2DConditionModel")
    paths = {stack.path for stack in find_stacks(model)}
    assert {"down_blocks.0.resnets", "up_blocks.1.attentions", "mid_block.resnets"} <= paths
    assert not paths & {"down_blocks", "up_blocks"}


class Block(nn.Module):
    def __init__(self, width: int, *, wide: int = 8, gated: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, wide)
        self.down = nn.Linear(wide, width)
        if gated:
            self.gate = nn.Linear(width, wide)
            self.down = self._modules.pop("down")  # registered last, as models do


class Other(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Block(4)
        self.experts = nn.ModuleList(Block(4) for _ in range(6))


class Siblings(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        for at in range(count):
            self.add_module(f"part{at}", Block(4))


class Coders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "c"):
            self.add_module(name, nn.ModuleList(Block(4) for _ in range(2)))


def blocks(*widths: int) -> nn.ModuleList:
    return nn.ModuleList(Block(width) for width in widths)


MADE: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "alike": (lambda: nn.ModuleDict({"run": blocks(4, 4, 4)}), {"run": 3}),
    "some gated": (
        lambda: nn.ModuleDict({"run": nn.ModuleList([Block(4), Block(4, gated=True)])}),
        {"run": 2},
    ),
    "other inner widths": (
        lambda: nn.ModuleDict({"run": nn.ModuleList([Block(4), Block(4, wide=16)])}),
        {"run": 2},
    ),
    "widths that change": (lambda: nn.ModuleDict({"run": blocks(4, 8, 16)}), {}),
    "two widths in one list": (lambda: nn.ModuleDict({"run": blocks(4, 4, 8, 8, 8)}), {"run": 3}),
    "classes that recur": (
        lambda: nn.ModuleDict(
            {"run": nn.ModuleList([Block(4), Other(4), Block(4), Other(4), Block(4)])}
        ),
        {"run": 5},
    ),
    "parts of one layer": (
        lambda: nn.ModuleDict({"run": nn.ModuleList([Block(4), Other(4)])}),
        {},
    ),
    "experts in layers": (
        lambda: nn.ModuleDict({"run": nn.ModuleList([Layer(), Layer()])}),
        {"run": 2},
    ),
    "a list of one": (lambda: nn.ModuleDict({"run": blocks(4)}), {"run": 1}),
    "three siblings": (lambda: nn.ModuleDict({"holder": Siblings(3)}), {"holder": 3}),
    "two siblings": (lambda: nn.ModuleDict({"holder": Siblings(2)}), {}),
    "siblings that hold stacks": (
        lambda: nn.ModuleDict({"coders": Coders()}),
        {"coders.a": 2, "coders.b": 2, "coders.c": 2},
    ),
    "linear layers in a chain": (
        lambda: nn.ModuleDict({"run": nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))}),
        {"run": 5},
    ),
    "no layers": (lambda: nn.ModuleDict({"only": nn.Linear(4, 4)}), {}),
    "dropouts": (lambda: nn.Sequential(nn.Dropout(), nn.Dropout()), {}),
    "dictionary of layers": (
        lambda: nn.ModuleDict({"run": nn.ModuleDict({str(n): Block(4) for n in range(3)})}),
        {"run": 3},
    ),
}


@pytest.mark.parametrize("case", MADE)
def test_stacks(case: str):
    make, expected = MADE[case]
    found = find_stacks(make())
    if case == "two widths in one list":
        assert [(str(stack), len(stack)) for stack in found] == [("run 0..1", 2), ("run 2..4", 3)]
        return
    assert {stack.path: len(stack) for stack in found} == expected


def test_a_site_lies_in_the_outermost_layer():
    model = nn.ModuleDict({"run": nn.ModuleList([Layer(), Layer()])})
    known = ModelMap(model)
    position = known.position(known.by_path["run.1.experts.3.up"])
    assert position is not None
    assert (position[0].path, position[1]) == ("run", 1)


def test_the_largest_stack_has_most_layers_then_most_parameters():
    model = nn.ModuleDict(
        {"a": blocks(4, 4), "b": blocks(8, 8), "c": nn.ModuleList([nn.Linear(4, 4)] * 1)}
    )
    largest = ModelMap(model).largest
    assert largest is not None
    assert largest.path == "b"


def test_stacks_need_no_weights():
    with torch.device("meta"):
        model = nn.ModuleDict({"run": blocks(4096, 4096)})
    assert len(find_stacks(model)[0]) == 2
