from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgery
from surgery import Rule, Shortcuts
from surgery.errors import CaptureError, ModelStateError
from surgery.passes.streams import all_segments, graph_driver
from surgery.passes.streams.drivers import code_of
from tests.passes.test_shortcuts import by_the_formula, randomise


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        branch = self.dropout(torch.tanh(self.linear(self.norm(x))))
        return x + (branch if scale is None else branch * scale)


@pytest.fixture(autouse=True)
def _no_variants_of_other_tests(monkeypatch):
    monkeypatch.setattr(graph_driver, "_classes", {})


def blocks(count: int = 4) -> list[Block]:
    return [Block() for _ in range(count)]


# -- code that cannot be rewritten ----------------------------------------------------------------


class Executed(nn.Module):
    """The forward has no source."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks())

    text = (
        "def forward(self, x):\n    for layer in self.layers:\n        x = layer(x)\n    return x\n"
    )
    scope: dict[str, Any] = {}  # noqa: RUF012  a scratch dictionary
    exec(text, scope)  # noqa: S102  our own text
    forward = scope["forward"]


def held_under(module: nn.Module, name: str) -> nn.Module:
    return vars(module)["_modules"][name]


class ByName(nn.Module):
    """The blocks are looked up by names that are made at run time."""

    def __init__(self) -> None:
        super().__init__()
        # Names that the machinery below uses itself must not get in the way.
        self.first, self.key, self.edit = nn.Linear(8, 8), nn.Identity(), nn.Identity()
        for index, block in enumerate(blocks()):
            setattr(self, f"block{index}", block)

    def forward(self, x: Tensor) -> Tensor:
        x = self.key(self.edit(self.first(x)))
        for name in ["block" + str(index) for index in range(4)]:
            x = held_under(self, name)(x)
        return x


def run_backwards_twice(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in reversed(list(reversed(layers))):
        x = layer(x)
    return x


class Helped(nn.Module):
    """A function that is no method receives the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks())

    def forward(self, x: Tensor) -> Tensor:
        return run_backwards_twice(list(self.layers), x)


class Runner(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = {str(index): layer for index, layer in enumerate(layers)}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


class Elsewhere(nn.Module):
    """Another module than the one that has the blocks calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks())
        self.runner = Runner(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.runner(x)


class Inside(nn.Module):
    """The driver is not the root, and its call has more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Switched()
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, {"scale": x.mean()}, twice=True)["state"])


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks(3))
        self.checkpointed = False

    def forward(self, x: Tensor, options: dict[str, Tensor], *, twice: bool) -> dict[str, Tensor]:
        for name in [str(index) for index in range(3)]:
            x = held_under(self.layers, name)(x, scale=options["scale"])
        return {"state": x * 2 if twice else x}


FORMS: dict[str, Callable[[], nn.Module]] = {
    "executed": Executed,
    "by name": ByName,
    "helper": Helped,
    "elsewhere": Elsewhere,
    "inside": Inside,
}


def built(form: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return form().eval(), torch.randn(3, 5, 8)


def rewired(form: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, Tensor]:
    model, x = built(form)
    plan = surgery.plan(model, Rule(Shortcuts(**options)), example=x)
    (edit,) = plan.edits
    assert any("is replaced by capture, specialised on its guards" in n for n in edit.notes)
    plan.apply()
    randomise(model)
    return model, x


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
class TestForms:
    def test_identity_start_changes_no_bit(self, form):
        model, x = built(form)
        stock = copy.deepcopy(model)
        surgery.apply(model, Rule(Shortcuts(init="identity")), example=x)
        for training in (False, True):
            outputs = []
            for each in (stock, model):
                torch.manual_seed(5)
                outputs.append(each.train(training)(x))
            assert torch.equal(*outputs)

    def test_random_coefficients_follow_the_formula(self, form):
        model, x = rewired(form)
        stock = built(form)[0]
        for y in (x, torch.randn(2, 7, 8)):
            with by_the_formula(stock, model), torch.no_grad():
                expected = stock(y)
            # Both sides float32; only the order of a sum of four terms differs.
            torch.testing.assert_close(model(y), expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(expected, stock(y), rtol=1e-2)

    def test_undo_takes_everything_back(self, form):
        model, x = built(form)
        before, classes = model(x), [type(module) for module in model.modules()]
        surgery.apply(model, Rule(Shortcuts()), example=x)
        assert not torch.equal(model(x), before)
        surgery.undo(model)
        assert torch.equal(model(x), before)
        assert [type(module) for module in model.modules()] == classes
        assert not any(key.startswith("_surgery") for m in model.modules() for key in vars(m))

    def test_pickle_and_deepcopy(self, form):
        model, x = rewired(form)
        expected = model(x)
        unpickled = pickle.loads(pickle.dumps(model))  # noqa: S301  our own bytes
        for made in (copy.deepcopy(model), unpickled):
            assert torch.equal(made(x), expected)
            for _, _, segment in all_segments(made):
                segment.topology.logits.data.zero_()
            assert not torch.equal(made(x), expected)


def test_the_code_reads_like_a_loop_that_was_rewritten():
    model, _ = rewired(Helped)
    text = code_of(model)["forward"]
    assert "steps = _begin(self.layers)" in text
    assert "layers_1 = steps.run(self.layers[1], layers_0)" in text


def test_the_plan_shows_the_code():
    model, x = built(Helped)
    plan = surgery.plan(model, Rule(Shortcuts()), example=x)
    assert "steps.run(self.layers[1], layers_0)" in plan.code()["Helped.forward"]


def test_two_models_of_one_source_share_their_code():
    one, other = rewired(Helped)[0], rewired(Helped)[0]
    assert type(one) is type(other)


class TestWithoutACapture:
    """As in a process of its own: what was captured while planning is not there."""

    def test_the_first_call_captures(self, tmp_path, monkeypatch):
        model, x = rewired(Inside)
        expected = model(x)
        surgery.save(model, tmp_path / "out")
        monkeypatch.setattr(graph_driver, "_classes", {})
        made = surgery.restore(tmp_path / "out", built(Inside)[0])
        assert code_of(made.body) == {}
        assert torch.equal(made(x), expected)
        assert "steps.run" in code_of(made.body)["forward"]

    def test_under_compile_that_is_an_error(self, monkeypatch):
        model, x = rewired(Helped)
        data = pickle.dumps(model)
        monkeypatch.setattr(graph_driver, "_classes", {})
        made = pickle.loads(data)  # noqa: S301  our own bytes
        compiled = torch.compile(made, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="run the model once on such an input beforehand"):
            compiled(x)
        expected = made(x)
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_compile(training):
    model, x = rewired(Elsewhere)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train(training)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks())

    def forward(self, x: Tensor, power: int = 1) -> Tensor:
        for _ in range(power):
            x = x * 1.5
        return run_backwards_twice(list(self.layers), x)


class TestGuards:
    def test_a_call_that_fits_none_is_captured_anew(self):
        model, x = rewired(Branching)
        stock = built(Branching)[0]
        for power in range(1, 4):
            with by_the_formula(stock, model), torch.no_grad():
                expected = stock(x, power)
            torch.testing.assert_close(model(x, power), expected, rtol=1e-5, atol=1e-5)
        assert code_of(model)["forward"].count("def forward") == 3

    def test_past_the_limit_the_guard_is_named(self):
        model, x = rewired(Branching)
        for power in range(1, 9):
            model(x, power)
        with pytest.raises(CaptureError, match="8 variants already; captured for a call where"):
            model(x, 9)


# -- checkpointing --------------------------------------------------------------------------------


class Checkpointing(nn.Module):
    """Checkpoints its blocks, alone or two and what is between them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks())
        self.mode = "off"

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        layers = [held_under(self.layers, str(index)) for index in range(4)]
        if self.mode == "off":
            return run_pair(layers[2:], run_pair(layers[:2], x, scale), scale)
        reentrant = self.mode == "reentrant"
        for pair in (layers[:2], layers[2:]):
            x = checkpoint(run_pair, pair, x, scale, use_reentrant=reentrant)
        return x


def run_pair(layers: list[nn.Module], x: Tensor, scale: Tensor | None) -> Tensor:
    x = layers[0](x, scale=scale)
    return layers[1](torch.sin(x), scale=scale)


class TestCheckpointing:
    @pytest.mark.parametrize("mode", ["plain", "reentrant"])
    @pytest.mark.parametrize("training", [False, True])
    def test_gradients_are_those_without(self, mode, training):
        model, x = rewired(Checkpointing)
        model.train(training)
        x.requires_grad_()
        scale = torch.rand(8, requires_grad=True)
        found = []
        for model.mode in ("off", mode):
            model.zero_grad()
            x.grad = scale.grad = None
            torch.manual_seed(5)
            # Two forwards before one backward.
            out = model(x, scale) * model(x, scale)
            out.square().sum().backward()
            found.append([out, x.grad, scale.grad, *(p.grad for p in model.parameters())])
        # The sums of two backward passes may be made in another order.
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
        assert code_of(model)["forward"].count("steps.checkpointed(") == 4

    def test_blocks_are_recomputed(self):
        model, x = rewired(Checkpointing)
        model.mode = "plain"
        calls = []
        model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
        model(x.requires_grad_()).sum().backward()
        assert len(calls) == 2


# -- other ways in --------------------------------------------------------------------------------


class WithMethods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks())
        self.head = nn.Linear(8, 8)

    def features(self, x: Tensor) -> Tensor:
        return run_backwards_twice(list(self.layers), x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def test_other_methods_that_run_blocks_are_captured_too():
    model, x = rewired(WithMethods)
    assert torch.equal(model.head(model.features(x)), model(x))


def test_what_runs_the_blocks_of_others_refuses_other_callers():
    model, x = rewired(Elsewhere)
    with pytest.raises(CaptureError, match="Runner holds blocks whose shortcuts cross"):
        model.runner(x)


class TwoStacks(nn.Module):
    """One loop that can be rewritten and one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(blocks(3))
        self.second = nn.ModuleList(blocks(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.first:
            x = layer(x)
        for name in [str(index) for index in range(3)]:
            x = held_under(self.second, name)(x)
        return x


def test_a_stack_that_can_be_rewritten_beside_one_that_cannot():
    model, x = built(TwoStacks)
    before, stock = model(x), copy.deepcopy(model)
    for name in ("first", "second"):
        where = surgery.Where(stack=name)
        surgery.apply(model, Rule(Shortcuts(), where=where, id=name), example=x)
    randomise(model)
    with by_the_formula(stock, model), torch.no_grad():
        expected = stock(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    surgery.undo(model, last=1)
    with by_the_formula(stock, model), torch.no_grad():
        expected = stock(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    surgery.undo(model)
    assert torch.equal(model(x), before)


# -- what neither way can do ----------------------------------------------------------------------


class Result:
    """No dataclass, so a graph cannot tell how to make one."""

    def __init__(self, state: Tensor) -> None:
        self.state = state


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks())

    def forward(self, x: Tensor) -> Result:
        for name in [str(index) for index in range(4)]:
            x = held_under(self.layers, name)(x)
        return Result(x)


def test_when_both_ways_fail_the_error_says_why():
    model, x = built(Untraceable)
    with pytest.raises(CaptureError) as caught:
        surgery.apply(model, Rule(Shortcuts()), example=x)
    text = str(caught.value)
    assert "layers.0" in text
    assert "test_shortcuts_graph.py:" in text
    assert "; nor can its graph be rewired instead: " in text


def test_an_instance_forward_is_not_hidden():
    model, x = built(Helped)
    plan = surgery.plan(model, Rule(Shortcuts()), example=x)
    model.forward = lambda x: x
    with pytest.raises(ModelStateError, match="forward of its own on the instance"):
        plan.apply()
    del model.forward
    assert not surgery.shortcuts(model)
    plan = surgery.plan(model, Rule(Shortcuts()), example=x)
    plan.apply()
    assert surgery.shortcuts(model)


def test_a_driver_tells_which_inputs_it_takes():
    model, _ = built(Checkpointing)
    before = inspect.signature(model.forward)
    model, _ = rewired(Checkpointing)
    assert inspect.signature(model.forward) == before
    assert list(before.parameters) == ["x", "scale"]


def test_a_driver_that_was_wrapped_since_cannot_be_undone():
    model, x = rewired(Elsewhere)
    expected, cls = model(x), type(model.runner)
    model.runner.__class__ = type("Wrapped", (cls,), {})
    with pytest.raises(ModelStateError, match="runner: the class of this module became Wrapped"):
        surgery.undo(model)
    assert torch.equal(model(x), expected)
    model.runner.__class__ = cls
    surgery.undo(model)


def test_threads_share_a_driver():
    model, x = rewired(Elsewhere)
    inputs = [x + index for index in range(4)]
    expected = [model(each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(model, inputs * 4))
    assert all(map(torch.equal, found, expected * 4))
