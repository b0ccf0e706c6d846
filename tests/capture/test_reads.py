"""Plain values that a forward reads off its modules are guarded: a change is noticed."""

from __future__ import annotations

import copy
import enum
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.capture import Capture, Forward, capture
from surgery.errors import CaptureError


class Config:
    """As a library's configuration: attributes and methods."""

    def __init__(self) -> None:
        self.activation = "gelu"
        self.depth = 2
        self.inner = None

    def has_inner(self) -> bool:
        return self.inner is not None


class Mode(enum.Enum):
    SUM = 1
    MEAN = 2


class Reads(nn.Module):
    kind = "a"  # of the class
    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.25)
        self.config = Config()
        self.flag = False
        self.window: Any = (2, 2)
        self.names = ["x"]
        self.mode = Mode.SUM
        self.act = torch.tanh
        self.extra: Any = None
        self.register_parameter("scale", None)

    @property
    def doubled(self) -> bool:
        return self.flag and self.config.depth > 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.lin(x)) * self.factor + (1 if self.kind == "a" else 2)
        if self.config.activation == "gelu":
            y = nn.functional.gelu(y)
        if self.flag:
            y = y + 1
        if any(size > 2 for size in self.window):
            y = y.roll(1, -1)
        if "y" in self.names:
            y = -y
        if self.scale is not None:
            y = y * self.scale
        if self.config.has_inner() or self.doubled:
            y = y * 3
        y = y.sum(-1) if self.mode is Mode.SUM else y.mean(-1)
        y = y * (1 - self.drop.p)
        return y if self.extra is None else y + self.extra


def change(name: str, value: Any) -> Any:
    def done(module: Any) -> None:
        *path, last = name.split(".")
        for part in path:
            module = getattr(module, part)
        setattr(module, last, value)

    return pytest.param(done, id=name)


CHANGES = [
    change("flag", True),
    change("kind", "b"),
    change("window", (2, 3)),
    change("names", ["x", "y"]),
    change("mode", Mode.MEAN),
    change("act", torch.sin),
    change("extra", 1.5),
    change("scale", nn.Parameter(torch.full((4,), 2.0))),
    change("config.activation", "relu"),
    change("config.inner", 3),
]


@pytest.fixture
def pair() -> tuple[Any, Any, Capture]:
    """A module, a copy of it, and the capture."""
    torch.manual_seed(0)
    module = Reads()
    return module, copy.deepcopy(module), capture(module, (torch.ones(2, 4),))


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("done", CHANGES)
def test_a_change_of_what_was_read_is_another_variant(done: Any, pair: Any) -> None:
    module, stock, made = pair
    forward = Forward(made)
    assert torch.equal(forward(module, X), stock(X))
    done(module), done(stock)
    with pytest.raises(CaptureError, match=r"captured for a call where self\..*test_reads.py:\d+"):
        made.forward(module, X)
    assert torch.equal(forward(module, X), stock(X))
    assert len(forward.variants) == 2


def test_one_change_of_two_that_must_go_together(pair: Any) -> None:
    module, stock, made = pair
    forward = Forward(made)
    for each in (module, stock):
        each.flag, each.config.depth = True, 3
    assert torch.equal(forward(module, X), stock(X))
    for each in (module, stock):
        each.config.depth = 1
    assert torch.equal(forward(module, X), stock(X))
    assert len(forward.variants) == 3


@pytest.mark.parametrize(("name", "value"), [("factor", 3.0), ("drop.p", 0.5)])
def test_numbers_are_followed_without_another_variant(name: str, value: Any, pair: Any) -> None:
    module, stock, made = pair
    for each in (module, stock):
        change(name, value).values[0](each)
    assert torch.equal(made.forward(module, X), stock(X))


def test_what_was_not_read_is_not_guarded(pair: Any) -> None:
    module, stock, made = pair
    module.unread, module.config.unread = "something", "else"
    assert torch.equal(made.forward(module, X), stock(X))
    assert "unread" not in made.source


def test_the_guards_can_be_read(pair: Any) -> None:
    source = pair[2].source
    for text in (
        "and self.flag is False",
        "and self.kind == 'a'",
        "and self.window == (2, 2)",
        "and self.names == ['x']",
        "and self.scale is None",
        "and self.config.activation == 'gelu'",
    ):
        assert text in source
    assert "doubled" not in source  # computed from what is guarded already
    assert "self.drop.p" in source


def test_an_assignment_to_a_config_is_an_error_with_its_line() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()

        def forward(self, x: Tensor) -> Tensor:
            self.config.depth = 3
            return x

    module = Writes()
    with pytest.raises(CaptureError, match=r"test_reads.py:\d+: assignment to config.depth"):
        capture(module, (X,))
    assert module.config.depth == 2


def test_values_that_the_forward_assigned_are_not_guarded() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = "none"

        def forward(self, x: Tensor) -> Tensor:
            self.last = "this"
            return x + 1 if self.last == "this" else x

    module, stock = Counts(), Counts()
    forward = Forward(capture(module, (X,)))
    for _ in range(3):
        assert torch.equal(forward(module, X), stock(X))
    assert module.last == stock.last
    assert len(forward.variants) <= 2
