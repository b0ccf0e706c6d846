"""Every module class of the zoo, captured at one call: the same bits there and at another shape."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.capture import Capture, capture
from surgery.errors import CaptureError
from surgery.sources.examples import Example
from tests import zoo
from tests.capture.compare import assert_same

Call = tuple[tuple[Any, ...], dict[str, Any]]

# Parents that build a cache and hand it to their layers. Their loops are rewritten instead.
BUILDS_A_CACHE = {
    "LlamaModel",
    "Qwen3Model",
    "Gemma3TextModel",
    "GPT2Model",
    "MixtralModel",
    "Qwen3MoeModel",
    "WhisperDecoder",
}


@pytest.mark.parametrize("name", zoo.names())
def test_every_class(name: str) -> None:
    model, example = zoo.build(name)
    modules = _one_of_each_class(model)
    calls = _calls(model, example, modules)
    other = _calls(model, _wider(example), modules)
    assert calls
    for path, call in calls.items():
        module = modules[path]
        if type(module).__name__ in BUILDS_A_CACHE:
            with pytest.raises(CaptureError, match="Cache was made here and is passed on"):
                capture(module, *copy.deepcopy(call))
            continue
        captured = capture(module, *copy.deepcopy(call))
        _compare(module, captured, call)
        _compare(module, captured, other[path])
        module.train()
        _compare(module, capture(module, *copy.deepcopy(call)), call)
        module.eval()


def _one_of_each_class(model: nn.Module) -> dict[str, nn.Module]:
    found: dict[type, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        if path and not type(module).__module__.startswith("torch.nn"):
            found.setdefault(type(module), (path, module))
    return dict(found.values())


def _calls(model: nn.Module, example: Example, modules: dict[str, nn.Module]) -> dict[str, Call]:
    """The first call of each module when the model runs, copied before it does anything."""
    calls: dict[str, Call] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(path, copy.deepcopy((args, kwargs)))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(path), with_kwargs=True)
        for path, module in modules.items()
    ]
    with torch.no_grad():
        model(*example.args, **example.kwargs)
    for handle in handles:
        handle.remove()
    return calls


def _wider(example: Example) -> Example:
    """One more in the batch, and text cut at the front (the padding is at its end)."""

    def change(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: change(key, item) for key, item in value.items()}
        if not isinstance(value, Tensor) or not value.ndim or name in ("img_ids", "txt_ids"):
            return value
        if name in ("input_ids", "attention_mask", "decoder_input_ids"):
            value = value[:, 5:]
        return torch.cat([value, value[:1]])

    kwargs = {name: change(name, value) for name, value in example.kwargs.items()}
    return Example(tuple(change("", value) for value in example.args), kwargs)


def _compare(module: nn.Module, captured: Capture, call: Call) -> None:
    """Same results, same changes to arguments and buffers, from the same seed."""
    theirs = _run(module, module, call)
    mine = _run(module, lambda *args, **kwargs: captured.forward(module, *args, **kwargs), call)
    assert_same(mine, theirs)


def _run(module: nn.Module, forward: Any, call: Call) -> Any:
    args, kwargs = copy.deepcopy(call)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    torch.manual_seed(0)
    with torch.no_grad():
        result = forward(*args, **kwargs)
        after = {name: buffer.clone() for name, buffer in module.named_buffers()}
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    return result, args, kwargs, after
