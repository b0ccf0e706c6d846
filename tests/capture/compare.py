"""Helpers: the tensors in a result, and a graph run by hand."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.capture import Trace


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested result, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def assert_same(one: Any, other: Any) -> None:
    """Both hold the same tensors, bit for bit."""
    pairs = list(zip(tensors_in(one), tensors_in(other), strict=True))
    assert pairs
    for left, right in pairs:
        assert torch.equal(left, right)
        assert left.dtype == right.dtype


def run(trace: Trace, model: nn.Module, inputs: list[Tensor]) -> Any:
    """The value of a whole-model trace, its nodes computed one by one."""
    given = iter(inputs)
    known: dict[fx.Node, Any] = {}
    for node in trace.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "output":
            return args[0]
        known[node] = _compute(trace, model, node, args, kwargs, given)
    raise AssertionError("no output")


def _compute(
    trace: Trace, model: nn.Module, node: fx.Node, args: Any, kwargs: Any, given: Iterator[Tensor]
) -> Any:
    if node.op == "placeholder":
        return next(given)
    if node.op == "get_attr":
        constant = trace.constants.get(node.target)
        return operator.attrgetter(node.target)(model) if constant is None else constant
    if node.op == "call_module":
        return model.get_submodule(node.target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)
