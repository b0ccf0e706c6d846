"""Each way Python can ask for a value leaves a guard with its line; nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.capture import capture, trace_model
from surgery.errors import CaptureError


class Asks(nn.Module):
    """Puts a question to its input on a line of its own."""

    def __init__(self, question: Callable[[Asks, Tensor], Any]) -> None:
        super().__init__()
        self.question = question
        self.width = 4
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        self.question(self, x)
        return x + 1


# (question, kind of guard, what the guard says)
DEMANDS: list[tuple[Callable[[Any, Any], Any], str, str]] = [
    (lambda m, x: bool(x.shape[0] > 1), "bool", "x.shape[0] > 1 == True"),
    (lambda m, x: x.shape[1] == 5 and None, "bool", "x.shape[1] == 5 == True"),
    (lambda m, x: range(x.shape[1] // 2), "int", "x.shape[1] // 2 == 2"),
    (lambda m, x: int(x.shape[1]), "int", "x.shape[1] == 5"),
    (lambda m, x: float(x.shape[1]), "float", "x.shape[1] == 5"),
    (lambda m, x: [0] * x.shape[0], "int", "x.shape[0] == 2"),
    (lambda m, x: [0, 1, 2][x.size(0)], "int", "x.shape[0] == 2"),
    (lambda m, x: len(x), "int", "x.shape[0] == 2"),
    (lambda m, x: str(x.shape[0]), "str", "x.shape[0] == 2"),
    (lambda m, x: f"{x.shape[0]}", "str", "x.shape[0] == 2"),
    (lambda m, x: {x.shape[0]: 1}, "hash", "x.shape[0] == 2"),
    (lambda m, x: max(x.shape[0], x.shape[1]), "bool", "x.shape[1] > x.shape[0] == True"),
    (lambda m, x: list(x.unbind(0)), "len", "len(unbind) == 2"),
    (lambda m, x: x.dtype, "dtype", "x.dtype == torch.float32"),
    (lambda m, x: x.device, "device", "x.device.type == 'cpu'"),
    (lambda m, x: bool(x.is_contiguous()), "bool", "x.is_contiguous() == True"),
    (lambda m, x: bool(x.requires_grad), "bool", "x.requires_grad == False"),
    (lambda m, x: bool((x > 0).all()), "data", "bool(gt.all()) == True"),
    (lambda m, x: int(x.sum() * 0), "data", "int(mul) == 0"),
    (lambda m, x: range(torch.tensor([3]).tolist()[0]), "int", "getitem.item() == 3"),
    (lambda m, x: bool(m.training), "bool", "self.training == True"),
    (lambda m, x: range(m.width), "int", "self.width == 4"),
    (lambda m, x: float(m.scale), "float", "self.scale == 0.5"),
    (lambda m, x: len(x.squeeze().shape), "rank", "len(x.squeeze().shape) == 3"),
]


@pytest.mark.parametrize(("question", "kind", "says"), DEMANDS)
def test_a_demand_is_a_guard(question: Callable[[Any, Any], Any], kind: str, says: str) -> None:
    guards = capture(Asks(question), (torch.ones(2, 5, 8),)).guards
    found = next(guard for guard in guards if guard.kind == kind)
    assert str(found).startswith(f"{says} (")
    assert found.file == __file__
    assert found.line == question.__code__.co_firstlineno


RECORDED: list[Callable[[Any, Any], Any]] = [
    lambda m, x: x.shape[0] * 2 + x.shape[1] // 3 - abs(-x.shape[2]),
    lambda m, x: torch.ones(x.shape[0], x.shape[1]),
    lambda m, x: torch.arange(x.shape[1]).repeat(x.shape[0]),
    lambda m, x: x.reshape(x.shape[0], -1, m.width)[:, : x.shape[1]],
    lambda m, x: x.expand(x.shape[0], *x.shape[1:]),
    lambda m, x: x * m.scale * x.shape[-1] ** -0.5,
    lambda m, x: torch.nn.functional.dropout(x, m.scale, training=m.training),
    lambda m, x: x.numel() + x.size(-1),
    lambda m, x: x.ndim + x.dim() + len(x.shape),
    lambda m, x: (
        isinstance(x, Tensor) and isinstance(x.shape[0], int) and isinstance(m.scale, float)
    ),
    lambda m, x: x is None or torch.is_tensor(x),
    lambda m, x: x.shape[0] is not None,
    lambda m, x: torch.full((x.shape[0],), x.shape[1]).sum().item() * 2,
]


@pytest.mark.parametrize("question", RECORDED)
def test_what_torch_can_compute_is_no_demand(question: Callable[[Any, Any], Any]) -> None:
    guards = capture(Asks(question), (torch.ones(2, 5, 8),)).guards
    assert [guard.expression for guard in guards] == ["self.question"]  # which `forward` reads


def test_device_type_is_guarded_and_the_device_passed_on() -> None:
    captured = capture(Asks(lambda m, x: torch.ones(1, device=x.device)), (torch.ones(2, 5, 8),))
    assert "torch.ones(1, device=x.device)" in captured.source


def test_a_whole_model_trace_notes_demands_but_not_facts() -> None:
    model = Asks(lambda m, x: (x.dtype, x.device, bool(x.shape[0] > 1)))
    assert [guard.kind for guard in trace_model(model, (torch.ones(2, 5, 8),)).guards] == ["bool"]


def test_each_demand_is_guarded_once() -> None:
    def twice(module: nn.Module, x: Tensor) -> None:
        length = x.shape[1]
        assert len(range(length)) == int(length)

    guards = capture(Asks(twice), (torch.ones(2, 5, 8),)).guards
    assert [guard.kind for guard in guards] == ["attribute", "int"]


def test_numpy_is_an_error_with_its_line() -> None:
    question = lambda m, x: x.numpy()  # noqa: E731  one line, whose number is known
    line = question.__code__.co_firstlineno
    with pytest.raises(CaptureError, match=rf"\(Asks\): .*test_guards.py:{line}: .*NumPy"):
        capture(Asks(question), (torch.ones(2, 5, 8),))
