"""Each form of a loop: what is rewritten runs every block once through the runtime."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch import nn

from surgery.capture.graft import graft
from surgery.capture.loops import Loops, Stack, loop_mixins
from surgery.errors import CaptureError
from tests.capture.loops import drivers, runtimes
from tests.capture.loops.drivers import FORMS, REFUSED, WIDTH, Block, Quiet
from tests.capture.loops.runtimes import scaled

RUNTIME = "tests.capture.loops.runtimes"
NAMES = ("0", "1", "2", "3")


def stacks_of(cls: type[nn.Module]) -> tuple[Stack, ...]:
    if cls is drivers.Straight:
        return (Stack("", ("block1", "block2", "block3", "block4")),)
    if cls is drivers.Stages:
        return tuple(Stack(f"stages.{i}.blocks", ("0", "1")) for i in range(2))
    return (Stack("layers", NAMES),)


def make(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return cls()


def rewritten(cls: type[nn.Module], runtime: str) -> tuple[nn.Module, Loops]:
    model = make(cls)
    loops = loop_mixins(cls, stacks_of(cls), f"{RUNTIME}:{runtime}")
    for mixin in loops.mixins:
        graft(model, mixin)
    return model, loops


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Block)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def x() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH).requires_grad_()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("train", [False, True])
def test_every_block_runs_once_through_the_runtime(name: str, train: bool) -> None:
    expected = make(FORMS[name]).train(train)(x())
    model, loops = rewritten(FORMS[name], "watch")
    model.train(train)
    assert not loops.refused
    runtimes.ran()
    found = model(x())
    used = {"Base": 2}.get(name, 4)
    assert [id(block) for block in runtimes.ran()] == [
        id(block) for block in blocks_of(model)[:used]
    ]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FORMS)
def test_a_runtime_that_scales_acts_like_hooks(name: str) -> None:
    reference = make(FORMS[name])
    for block in blocks_of(reference):
        block.register_forward_hook(lambda _m, _a, out: scaled(out))
    model, _ = rewritten(FORMS[name], "scale")
    expected, found = reference(x()), model(x())
    assert torch.equal(expected, found)
    if expected.requires_grad:
        expected.sum().backward()
        found.sum().backward()
        # Equal to rounding: under checkpointing, hooks scale inside the region.
        torch.testing.assert_close(gradients(reference), gradients(model))


@pytest.mark.parametrize("cls", REFUSED)
def test_what_is_not_understood_raises_when_called(cls: type[nn.Module]) -> None:
    model, loops = rewritten(cls, "watch")
    assert list(loops.refused) == ["forward"]
    reason = loops.refused["forward"]
    assert f"{cls.__name__}.forward" in reason
    assert REFUSED[cls] in reason
    if cls is not drivers.ByClass:
        assert "drivers.py:" in reason
        assert "`" in reason or cls is drivers.Replaced
    arguments: tuple[Any, ...] = (object(),) if cls in (drivers.Kept, drivers.Unknown) else ()
    with pytest.raises(CaptureError, match="could not be rewritten"):
        model(x(), *arguments)


def test_methods_that_run_nothing_are_left_alone() -> None:
    loops = loop_mixins(Quiet, (Stack("layers", NAMES),), f"{RUNTIME}:watch")
    assert loops.methods == ("forward",)
    assert loops.refused == {}


def test_the_runtime_starts_once_per_call_and_outside_loops() -> None:
    shown = loop_mixins(drivers.TwoParts, (Stack("layers", NAMES),), f"{RUNTIME}:watch").sources
    assert shown["forward"] == (
        "def forward(self, x: Tensor) -> Tensor:\n"
        "    steps = begin(self.layers)\n"
        "    for layer in self.layers[:2]:\n"
        "        x = steps(layer)(x)\n"
        "    x = x * 2\n"
        "    for layer in self.layers[2:]:\n"
        "        x = steps(layer)(x)\n"
        "    return x\n"
    )


def test_a_traceback_points_at_the_authors_line() -> None:
    model, _ = rewritten(drivers.Branches, "watch")
    plain = make(drivers.Branches)

    def frame(module: nn.Module, argument: Any) -> tuple[Any, ...]:
        with pytest.raises((AttributeError, RuntimeError)) as caught:
            module.train()(argument)
        (found,) = (
            frame
            for frame in traceback.extract_tb(caught.value.__traceback__)
            if frame.filename == drivers.__file__ and "tanh" not in (frame.line or "")
        )
        return found.filename, found.lineno, found.line, found.colno, found.end_colno

    # The first statement lies before the text that was put in, the second within it.
    assert frame(model, "text") == frame(plain, "text")
    assert frame(model, torch.zeros(3, 5)) == frame(plain, torch.zeros(3, 5))


def test_the_rewritten_method_keeps_what_the_original_says_of_itself() -> None:
    cls = drivers.Decorated
    (mixin,) = loop_mixins(cls, (Stack("layers", NAMES),), f"{RUNTIME}:watch").mixins
    new, old = mixin.__dict__["forward"], cls.__dict__["forward"]
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        assert getattr(new, attribute) == getattr(old, attribute)
    assert new.__code__ is old.__code__
    assert new.__wrapped__ is not old.__wrapped__
    assert "begin" not in vars(drivers)


def test_a_decorator_keeps_its_state() -> None:
    model, _ = rewritten(drivers.Decorated, "watch")
    plain = make(drivers.Decorated)
    plain(x())
    before = plain.calls
    model(x())
    assert model.calls == before + 1


@pytest.mark.parametrize("name", ["Plain", "TwoParts", "Zipped", "Derived", "Straight"])
def test_compiles_to_one_graph(name: str) -> None:
    model, _ = rewritten(FORMS[name], "scale")
    expected = model(x())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x()), expected)


def test_source_that_is_not_to_be_had_is_refused() -> None:
    text = (
        "def forward(self, x):\n    for layer in self.layers:\n        x = layer(x)\n    return x\n"
    )
    namespace: dict[str, Any] = {}
    exec(compile(text, "<nowhere>", "exec"), namespace)  # noqa: S102 (a class without a file)
    cls = type("Made", (drivers.Driver,), {"forward": namespace["forward"]})
    model, loops = rewritten(cls, "watch")
    assert "no source text of <nowhere>:1" in loops.refused["forward"]
    with pytest.raises(CaptureError, match="no source text"):
        model(x())


def test_a_file_that_changed_since_its_import_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "from torch import nn\n\nclass Changed(nn.Module):\n    def forward(self, x):\n"
        "        for layer in self.layers:\n            x = layer(x)\n        return x\n"
    )
    file = tmp_path / "changed_driver.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    cls = importlib.import_module("changed_driver").Changed
    file.write_text(text.replace("x = layer(x)", "x = layer(x) * 2"))
    loops = loop_mixins(cls, (Stack("layers", NAMES),), f"{RUNTIME}:watch")
    assert "is not what runs" in loops.refused["forward"]
