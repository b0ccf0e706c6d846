"""A `Forward` put over a module's own, in the middle of a model that knows nothing of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.capture import Forward, capture, trace_model
from surgery.capture.graft import graft
from tests import zoo


def put(module: nn.Module, forward: Forward) -> None:
    """Graft ``forward`` over the module's own."""

    class Mixin:
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

    graft(module, Mixin)


def call_of(model: nn.Module, path: str, kwargs: dict[str, Any]) -> Any:
    """The arguments a module gets when the model runs, as they were before it did anything."""
    calls: list[Any] = []

    def watch(module: nn.Module, args: Any, keywords: Any) -> None:
        calls.append(copy.deepcopy((args, keywords)))

    handle = model.get_submodule(path).register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        model(**kwargs)
    handle.remove()
    return calls[0]


@pytest.mark.parametrize(
    ("name", "layers", "attention"),
    [("llama", "model.layers", "self_attn"), ("gpt2", "transformer.h", "attn")],
)
def test_generation_with_and_without_a_cache(name: str, layers: str, attention: str) -> None:
    model, example = zoo.build(name)
    stock = copy.deepcopy(model)
    forwards: list[Forward] = []
    for index in range(len(model.get_submodule(layers))):
        for path in (f"{layers}.{index}", f"{layers}.{index}.{attention}"):
            module = model.get_submodule(path)
            call = call_of(stock, path, example.kwargs)
            forwards.append(Forward(capture(module, *call)))
            put(module, forwards[-1])
    prompt = example.kwargs["input_ids"][:, :6]
    for use_cache in (True, False):
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
        assert torch.equal(model.generate(prompt, **options), stock.generate(prompt, **options))
    # Every layer runs the code of the first: one compilation for all of them.
    sources = {variant.source for forward in forwards for variant in forward.variants}
    assert len(sources) <= len(forwards[0].variants) + len(forwards[1].variants)


def test_a_rewritten_model_can_be_traced() -> None:
    model, example = zoo.build("bert")
    before = trace_model(model, example.args, example.kwargs)
    path = "encoder.layer.0"
    layer = model.get_submodule(path)
    put(layer, Forward(capture(layer, *call_of(model, path, example.kwargs))))
    after = trace_model(model, example.args, example.kwargs)
    layers = [node.target for node in before.graph.nodes if node.op == "call_module"]
    assert [node.target for node in after.graph.nodes if node.op == "call_module"] == layers


def test_a_child_may_need_a_variant_while_its_parent_is_captured() -> None:
    class Child(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.shape[0] > 1 else x - 1

    parent = nn.Sequential(Child(), nn.ReLU())
    forward = Forward(capture(parent[0], (torch.ones(1, 2),)))
    put(parent[0], forward)
    assert torch.equal(
        capture(parent, (torch.ones(3, 2),)).forward(parent, torch.ones(3, 2)),
        torch.full((3, 2), 2.0),
    )
    assert len(forward.variants) == 2


def test_offload_hooks_are_looked_beneath() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, example = zoo.build("bert")
    plain = capture(model.encoder.layer[0], *call_of(model, "encoder.layer.0", example.kwargs))
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    hooked = capture(model.encoder.layer[0], *call_of(model, "encoder.layer.0", example.kwargs))
    assert hooked.source == plain.source


def test_an_instance_with_a_forward_of_its_own() -> None:
    module = nn.Linear(2, 2)
    module.forward = lambda x: x * 3
    assert "x * 3" in capture(module, (torch.ones(2),)).source
