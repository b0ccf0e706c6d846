"""Rewritten drivers under torch.compile and torch.export: one graph, as often compiled as stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests import zoo
from tests.capture.compare import assert_same
from tests.capture.loops.grafting import rewrite

NAMES = ("llama", "timm_vit")
"""A decorated loop, and a Sequential in a model."""


def repeated(value: Any) -> Any:
    """The same inputs for a batch of three."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != 2:
        return value
    return torch.cat([value, value[:1]])


def compiled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, Any]:
    """How many graphs two batch sizes take, and what the second gives."""
    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        run(*args, **kwargs)
        run(*args, **kwargs)
        more = {name: repeated(value) for name, value in kwargs.items()}
        result = run(*(repeated(value) for value in args), **more)
    return counter.frame_count, result


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_often_as_the_stock_model(name: str) -> None:
    stock, example = zoo.build(name)
    model, _ = zoo.build(name)
    rewrite(model, "plain")
    kwargs = dict(example.kwargs)
    if name == "llama":
        kwargs["use_cache"] = False
    expected, first = compiled(stock, example.args, kwargs)
    found, second = compiled(model, example.args, kwargs)
    assert found == expected
    assert_same(first, second)


def test_exports() -> None:
    model, example = zoo.build("timm_vit")
    rewrite(model, "scale")
    program = torch.export.export(model, example.args, dict(example.kwargs))
    with torch.no_grad():
        expected = model(*example.args, **example.kwargs)
        found = program.module()(*example.args, **example.kwargs)
    # Decomposed kernels round differently.
    torch.testing.assert_close(found, expected)
