"""Mixin classes: one per driver and stacks, placed right, picklable, safe between threads."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from surgery.capture.graft import graft, ungraft
from surgery.capture.loops import Stack, loop_mixins
from surgery.errors import CaptureError
from tests.capture.loops import drivers

LAYERS = (Stack("layers", ("0", "1", "2", "3")),)
SCALE = "tests.capture.loops.runtimes:scale"
WATCH = "tests.capture.loops.runtimes:watch"


def grafted(cls: type[nn.Module] = drivers.Plain, runtime: str = SCALE) -> nn.Module:
    torch.manual_seed(2)
    model = cls()
    for mixin in loop_mixins(cls, LAYERS, runtime).mixins:
        graft(model, mixin)
    return model


def x() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4)


def test_equal_arguments_give_the_identical_classes() -> None:
    first, again = (loop_mixins(drivers.Plain, LAYERS, SCALE) for _ in range(2))
    assert first is again
    assert type(grafted()) is type(grafted())
    other = loop_mixins(drivers.Plain, LAYERS, WATCH)
    assert other.mixins != first.mixins


def test_threads_that_ask_at_once_get_the_same_class() -> None:
    cls = type("Fresh", (drivers.Plain,), {})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: loop_mixins(cls, LAYERS, SCALE), range(16)))
    assert all(one is found[0] for one in found)


def test_a_method_reached_through_super_is_rewritten_where_it_is_defined() -> None:
    loops = loop_mixins(drivers.DerivedTwice, LAYERS, SCALE)
    model = grafted(drivers.DerivedTwice)
    order = [cls for cls in type(model).__mro__ if cls in (*loops.mixins, *drivers.FORMS.values())]
    names = [cls.__name__ for cls in order]
    assert names == ["DerivedTwice", "DerivedLoops", "Derived", "BaseLoops", "Base"]


def test_no_stack_is_an_error() -> None:
    with pytest.raises(CaptureError, match="no stack of Plain"):
        loop_mixins(drivers.Plain, (), SCALE)


def test_mixins_pickle_and_copy_to_themselves() -> None:
    for cls in (drivers.Plain, drivers.DerivedTwice):
        for mixin in loop_mixins(cls, LAYERS, SCALE).mixins:
            assert pickle.loads(pickle.dumps(mixin)) is mixin  # noqa: S301
            assert copy.deepcopy(mixin) is mixin


@pytest.mark.parametrize("cls", [drivers.Plain, drivers.DerivedTwice, drivers.Decorated])
def test_a_model_pickles_and_copies(cls: type[nn.Module]) -> None:
    model = grafted(cls)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):  # noqa: S301
        assert type(other) is type(model)
        assert torch.equal(other(x()), model(x()))


def test_a_model_unpickles_in_another_process(tmp_path: Path, root: Path) -> None:
    model = grafted(drivers.DerivedTwice)
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps((model, x(), model(x()))))
    code = (
        "import pickle, sys, torch\n"
        "model, x, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.equal(model(x), expected)\n"
        "assert 'BaseLoops' in [cls.__name__ for cls in type(model).__mro__]\n"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], cwd=root, check=True)


def test_undone_the_class_is_the_stock_one() -> None:
    model = grafted()
    (mixin,) = loop_mixins(drivers.Plain, LAYERS, SCALE).mixins
    ungraft(model, mixin)
    assert type(model) is drivers.Plain


def test_subclasses_that_wrap_forward_again_still_work() -> None:
    """transformers' layers wrap the forward of every subclass, the grafted class included."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    class Outer(GradientCheckpointingLayer):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(drivers.Block() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    class Inner(Outer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 3

    for cls in (Outer, Inner):
        stock = cls()
        expected = stock(x())
        for mixin in loop_mixins(cls, LAYERS, WATCH).mixins:
            graft(stock, mixin)
        assert torch.equal(stock(x()), expected)
        calls = []
        stock.gradient_checkpointing = True
        stock._gradient_checkpointing_func = lambda f, *args, calls=calls: (
            calls.append(f) or f(*args)
        )
        assert torch.equal(stock.train()(x()), expected)
        assert len(calls) == 1
