"""Rewired blocks against the formula, written into the stock block at its own additions.

The reference runs the stock forward and recomputes the result of each residual addition, which it
knows by the text of the statement: a table made by reading the models.
"""

from __future__ import annotations

import copy
import functools
import linecache
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.capture import RELAY, Capture, capture, code_of, forward_mixin, trace_model
from surgery.capture.blocks import capture_blocks
from surgery.capture.graft import graft
from surgery.errors import CaptureError
from surgery.passes.streams.block_edit import BlockEdit, owners_inlined, plan_block
from surgery.residuals import find_residuals
from tests import zoo
from tests.capture.compare import assert_same, tensors_in


def _planned(made: Capture, block: nn.Module, **options: Any) -> BlockEdit:
    return plan_block(made, find_residuals(made.graph, block), **options)


# Statement → (which operand is the shortcut, which stream).
LEFT, RIGHT = 0, 1
_TIMM = {"= x + self.drop_path": (LEFT, 0)}
_CONV = {"self.drop_path(x) + ": (RIGHT, 0), "x += shortcut": (RIGHT, 0)}
_LLAMA = {"= residual + hidden_states": (LEFT, 0)}
_BERT = {"hidden_states + input_tensor": (RIGHT, 0)}
_T5 = {"= hidden_states + self.dropout(": (LEFT, 0)}
_DIT = {"attn_output + hidden_states": (RIGHT, 0), "ff_output + hidden_states": (RIGHT, 0)}
_FLUX = {
    " hidden_states = hidden_states + attn_output": (LEFT, 0),
    " hidden_states = hidden_states + ff_output": (LEFT, 0),
    "= encoder_hidden_states + c": (LEFT, 1),
}
CASES: dict[str, tuple[tuple[str, ...], dict[str, tuple[int, int]]]] = {
    "llama": (("model.layers.0", "model.layers.3"), _LLAMA),
    "mixtral": (("model.layers.0",), _LLAMA),
    "gpt2": (
        ("transformer.h.0", "transformer.h.2"),
        {"attn_output + residual": (RIGHT, 0), "residual + feed_forward": (LEFT, 0)},
    ),
    "bert": (("encoder.layer.0", "encoder.layer.2"), _BERT),
    "deberta-v2": (("encoder.layer.1",), _BERT),
    "t5": (("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"), _T5),
    "timm_vit": (("blocks.0", "blocks.2"), _TIMM),
    "timm_swin": (("layers.0.blocks.0", "layers.0.blocks.1"), _TIMM),
    "timm_resnet": (("layer1.0", "layer2.0"), _CONV),
    "timm_convnext": (("stages.0.blocks.0", "stages.1.blocks.0"), _CONV),
    "timm_efficientnet": (("blocks.1.1",), _CONV),
    "DiTTransformer2DModel": (("transformer_blocks.0", "transformer_blocks.2"), _DIT),
    "PixArtTransformer2DModel": (
        ("transformer_blocks.1",),
        {**_DIT, "attn_output + hidden_states": (RIGHT, 0)},
    ),
    "FluxTransformer2DModel": (
        ("transformer_blocks.0", "single_transformer_blocks.1"),
        {**_FLUX, **_LLAMA},
    ),
}
MODES = ("add", "replace")


@dataclass
class Sites(TorchFunctionMode):
    """Inside, the additions of the table give what the formula says."""

    table: dict[str, tuple[int, int]]
    mode: str
    rows: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    seen: list[Tensor] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        entry = self._entry(func)
        if entry is None:
            return func(*args, **kwargs)
        side, stream = entry
        shortcut, branch = args[side].clone(), args[1 - side].clone()
        earlier = [s for s, of in zip(self.seen, self.streams, strict=True) if of == stream]
        row = self.rows[stream][len(earlier)]
        self.seen.append(shortcut)
        self.streams.append(stream)
        total = branch + shortcut if self.mode == "add" else branch.clone()
        for weight, state in zip(row, [*self.states[stream], *earlier, shortcut], strict=False):
            total = total + weight * state.reshape(total.shape)
        return total

    def _entry(self, func: Any) -> tuple[int, int] | None:
        if getattr(func, "__name__", "").strip("_") not in ("add", "iadd"):
            return None
        frame = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        return next((entry for text, entry in self.table.items() if text in line), None)


@contextmanager
def recorded(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The first calls of some modules, as they were before anything was done."""
    calls: dict[str, Any] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(path, copy.deepcopy((args, kwargs)))

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(watch(path), with_kwargs=True)
        for path in paths
    ]
    yield calls
    for handle in handles:
        handle.remove()


def captured(name: str, paths: Sequence[str]) -> tuple[nn.Module, Any, dict[str, Capture]]:
    """A model of the test's own, its example, and the captures of its blocks."""
    model, example, found = _captured(name, tuple(paths))
    return copy.deepcopy(model), example, found


@functools.cache
def _captured(name: str, paths: tuple[str, ...]) -> tuple[nn.Module, Any, dict[str, Capture]]:
    model, example = zoo.build(name)
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    residuals = find_residuals(trace_model(model, example.args, example.kwargs).graph, model)
    inline = {path: owners_inlined(path, residuals) for path in paths}
    found = capture_blocks(model, example.args, example.kwargs, paths=paths, inline=inline)
    assert list(found) == list(paths)
    return model, example, found


def calls_of(model: nn.Module, example: Any, paths: Sequence[str]) -> dict[str, Any]:
    with recorded(model, paths) as calls, torch.no_grad():
        model(*example.args, **example.kwargs)
    return calls


def cast(example: Any, dtype: torch.dtype) -> Any:
    return example.map(lambda t: t.to(dtype) if t.is_floating_point() else t)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(block: nn.Module, call: Any, *extra: Any) -> Any:
    args, kwargs = copy.deepcopy(call)
    torch.manual_seed(0)
    with torch.no_grad():
        return block(*args, *extra, **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_random_coefficients_follow_the_formula(name: str, mode: Any) -> None:
    paths, table = CASES[name]
    model, example, found = captured(name, paths)
    model.double()
    calls = calls_of(model, cast(example, torch.float64), paths)
    for path in paths:
        stock = copy.deepcopy(model.get_submodule(path))
        block = model.get_submodule(path)
        edit = _planned(found[path], block, mode=mode)
        shapes = _shapes(found[path], block, calls[path], edit)
        # Two earlier states for the first stream, three for the second.
        states = [
            [random(*shape, seed=n) for n in range(2 + stream)]
            for stream, shape in enumerate(shapes)
        ]
        rows = [
            random(sites := edit.sites.count(stream), sites + 2 + stream) / 2
            for stream in range(len(shapes))
        ]
        reference = Sites(table, mode, rows, states)
        with reference:
            expected = run(stock, calls[path])
        graft(block, forward_mixin("Rewired", found[path], block, edit))
        result, *new = run(block, calls[path], RELAY, *rows, *(s for part in states for s in part))
        assert reference.streams == list(edit.sites)
        # Both are float64 and differ in the order of a few additions only.
        mine, theirs = [*tensors_in(result), *new], [*tensors_in(expected), *reference.seen]
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(mine[0], next(tensors_in(run(stock, calls[path]))))


def _shapes(made: Capture, block: nn.Module, call: Any, edit: BlockEdit) -> list[Any]:
    """The shape of the state of each stream."""
    shapes: dict[int, Any] = {}
    for residual, stream in zip(find_residuals(made.graph, block), edit.streams, strict=True):
        shapes.setdefault(stream, residual.shape)
    return [shapes[stream] for stream in sorted(shapes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_coefficients_that_say_what_the_block_does_change_no_bit(
    name: str, dtype: torch.dtype
) -> None:
    paths, _ = CASES[name]
    model, example, found = captured(name, paths)
    model.to(dtype)
    calls = calls_of(model, cast(example, dtype), paths)
    for path in paths:
        stock = model.get_submodule(path)
        expected = run(stock, calls[path])
        for mode in MODES:
            block = copy.deepcopy(stock)
            edit = _planned(found[path], block, mode=mode)
            shapes = _shapes(found[path], block, calls[path], edit)
            graft(block, forward_mixin("Rewired", found[path], block, edit))
            rows = []
            for stream in range(len(shapes)):
                count = edit.sites.count(stream)
                rows.append(torch.zeros(count, 1 + count))
                if mode == "replace":
                    rows[-1][:, 1:] = torch.eye(count)
            states = [random(*shape).to(dtype) for shape in shapes]
            result, *_ = run(block, calls[path], RELAY, *rows, *states)
            assert_same(result, expected)


# -- what a block may do besides -----------------------------------------------------------------


class OntoItself(nn.Module):
    """Adds to its own copy, in place; keeps a view of it where asked to."""

    def __init__(self, *, keeps: bool = False) -> None:
        super().__init__()
        self.lin, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.keeps = keeps

    def forward(self, x: Tensor) -> Any:
        y = self.lin(x)
        view = y.view(-1, 4)
        y += self.other(y.tanh())
        y = y + self.lin(y.sin())
        return (y, view.sum()) if self.keeps else y


class OntoInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x += self.lin(x)
        return x * 2


class Parallel(nn.Module):
    """The shortcut is not the last thing to be added, and the branches are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.lin(x.tanh()), alpha=0.5) + self.other(x.sin())


def small(kind: Any, mode: Any, **options: Any) -> tuple[nn.Module, nn.Module, BlockEdit]:
    torch.manual_seed(0)
    stock = kind(**options).double()
    block = copy.deepcopy(stock)
    made = capture(block, (torch.ones(2, 4, dtype=torch.float64),))
    edit = _planned(made, block, mode=mode)
    graft(block, forward_mixin("Rewired", made, block, edit))
    return stock, block, edit


WEIGHTS = {"add": torch.tensor([[0.3, -0.4, 0.0], [0.5, 0.6, -0.7]], dtype=torch.float64)}
WEIGHTS["replace"] = WEIGHTS["add"] + 1


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_an_addition_onto_an_own_tensor(mode: str, keeps: bool) -> None:
    stock, block, _ = small(OntoItself, mode, keeps=keeps)
    x, old = random(2, 4), random(2, 4, seed=2)
    w = WEIGHTS[mode]
    y0 = stock.lin(x)
    y1 = y0 * (mode == "add") + stock.other(y0.tanh()) + w[0, 0] * old + w[0, 1] * y0
    out = y1 * (mode == "add") + stock.lin(y1.sin())
    out = out + w[1, 0] * old + w[1, 1] * y0 + w[1, 2] * y1
    result, *states = block(x, RELAY, w, old)
    if keeps:
        result, seen = result
        # Who else looks at the memory sees what the stock block writes there.
        torch.testing.assert_close(seen, (y0 + stock.other(y0.tanh())).sum())
    for mine, theirs in zip((result, *states), (out, y0, y1), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert ("clone" in code_of(block)) == keeps


@pytest.mark.parametrize("mode", MODES)
def test_an_addition_onto_the_input_is_still_seen_by_the_caller(mode: str) -> None:
    stock, block, _ = small(OntoInput, mode)
    x, old = random(2, 4), random(2, 4, seed=2)
    w = WEIGHTS[mode][:1, :2]
    branch, given = stock.lin(x), x.clone()
    result, state = block(given, RELAY, w, old)
    mixed = x * (mode == "add") + branch + w[0, 0] * old + w[0, 1] * x
    torch.testing.assert_close(result, mixed * 2)
    assert torch.equal(state, x)
    assert torch.equal(given, x + branch)


@pytest.mark.parametrize("mode", MODES)
def test_several_branches_keep_their_order(mode: str) -> None:
    stock, block, edit = small(Parallel, mode)
    assert len(edit.sites) == 1
    x, old = random(2, 4), random(2, 4, seed=2)
    w = WEIGHTS[mode][:1, :2]
    mixed = x * (mode == "add") + w[0, 0] * old + w[0, 1] * x
    expected = mixed + 0.5 * stock.lin(x.tanh()) + stock.other(x.sin())
    torch.testing.assert_close(block(x, RELAY, w, old)[0], expected)
    same = torch.tensor([[0.0, float(mode == "replace")]])
    for dtype in (torch.float32, torch.bfloat16):
        stock.to(dtype)
        block.to(dtype)
        low = x.to(dtype)
        assert torch.equal(block(low, RELAY, same, old.to(dtype))[0], stock(low))


def test_a_scaled_sum() -> None:
    torch.manual_seed(0)
    stock = Parallel().double()
    block = copy.deepcopy(stock)
    made = capture(block, (torch.ones(2, 4, dtype=torch.float64),))
    graft(
        block,
        forward_mixin("Rewired", made, block, _planned(made, block, mode="add", scaled=True)),
    )
    x, old = random(2, 4), random(2, 4, seed=2)
    w = torch.tensor([[0.3, -0.4, 0.9]], dtype=torch.float64)
    expected = w[0, 2] * stock(x) + w[0, 0] * old + w[0, 1] * x
    torch.testing.assert_close(block(x, RELAY, w, old)[0], expected)
    with pytest.raises(CaptureError, match="use mode: add"):
        _planned(made, stock, mode="replace", scaled=True)(made, stock)


def test_another_path_with_other_additions_is_refused() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
            x = x + self.lin(x)
            return x + self.lin(x) if twice else x

    block = Sometimes()
    made = capture(block, (torch.ones(2, 4),))
    graft(block, forward_mixin("Rewired", made, block, _planned(made, block, mode="add")))
    x = torch.ones(2, 4)
    assert len(block(x, RELAY, torch.zeros(1, 1))) == 2
    with pytest.raises(CaptureError, match=r"in \[the block, the block\], where the plan has"):
        block(x, RELAY, torch.zeros(1, 1), twice=True)


def test_a_block_without_residuals() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(CaptureError, match="no residual addition"):
        _planned(capture(block, (torch.ones(2, 4),)), block, mode="add")


def test_gradients_reach_everything() -> None:
    _, block, _ = small(OntoItself, "add")
    x, old, w = (
        t.clone().requires_grad_() for t in (random(2, 4), random(2, 4, seed=2), WEIGHTS["add"])
    )
    given = (x, old, w)

    def f(x: Tensor, old: Tensor, w: Tensor) -> Tensor:
        result, *states = block(x, RELAY, w, old)
        return result.sum() + sum((state**2).sum() for state in states)

    assert torch.autograd.gradcheck(f, given)
    f(*given).backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())
