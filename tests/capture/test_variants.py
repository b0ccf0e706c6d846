"""What a captured forward does when a call is not the one it was captured for."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.capture import Forward, capture
from surgery.errors import CaptureError
from tests.capture.compare import assert_same


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, flag: bool = False) -> Tensor:
        hidden = self.dropout(self.lin(x))
        hidden = hidden * 2 if hidden.mean() > 0 else hidden - 2
        if mask is not None:
            hidden = hidden.masked_fill(mask, 0)
        if x.shape[0] > 3:
            hidden = hidden + 1
        self.steps += 1
        return -hidden if flag else hidden


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """The module and a copy to compare it with."""
    stock = Branches().eval()
    return copy.deepcopy(stock), stock


def _agree(forward: Forward, pair: tuple[nn.Module, nn.Module], *args: Any, **kwargs: Any) -> None:
    module, stock = pair
    torch.manual_seed(3)
    expected = stock(*args, **kwargs)
    torch.manual_seed(3)
    assert_same([forward(module, *args, **kwargs), module.steps], [expected, stock.steps])


def test_none_flags_sizes_and_training_each_get_a_variant(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    module, stock = pair
    x, mask = torch.full((2, 4), 0.1), torch.tensor([True, False, False, True])
    forward = Forward(capture(module, (x,)))
    _agree(forward, pair, x)
    assert len(forward.variants) == 1
    _agree(forward, pair, x, mask)
    _agree(forward, pair, x, mask=mask)
    assert len(forward.variants) == 2
    _agree(forward, pair, x, flag=True)
    assert len(forward.variants) == 3
    _agree(forward, pair, torch.full((5, 4), 0.1))
    assert len(forward.variants) == 4
    before = len(forward.variants)
    _agree(forward, pair, x)
    assert len(forward.variants) == before
    module.double(), stock.double()
    _agree(forward, pair, x.double())
    assert len(forward.variants) == before  # nothing asked for the dtype


def test_training_is_followed_without_a_variant_where_no_branch_asks() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, training=self.training)

    module = Drops().eval()
    forward = Forward(capture(module, (torch.ones(3),)))
    assert torch.equal(forward(module, torch.ones(64)), torch.ones(64))
    module.train()
    assert (forward(module, torch.ones(64)) == 0).any()
    assert len(forward.variants) == 1


def test_a_branch_on_data_is_taken_up_where_it_parts(pair: tuple[nn.Module, nn.Module]) -> None:
    """The dropout before the branch has drawn its numbers and must not draw again."""
    module, stock = pair
    module.train(), stock.train()
    forward = Forward(capture(module, (torch.ones(2, 4),)))
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        _agree(forward, pair, torch.randn(2, 4, generator=generator))
    assert len(forward.variants) == 2


def test_past_the_limit_the_guard_is_named(pair: tuple[nn.Module, nn.Module]) -> None:
    module, _ = pair
    forward = Forward(capture(module, (torch.ones(2, 4),)), limit=2)
    forward(module, torch.ones(2, 4), flag=True)
    with pytest.raises(CaptureError, match=r"Branches: 2 variants already; .*x\.shape\[0\] > 3"):
        forward(module, torch.ones(5, 4), flag=True)


def test_a_single_capture_raises_at_once(pair: tuple[nn.Module, nn.Module]) -> None:
    module, _ = pair
    captured = capture(module, (torch.ones(2, 4),))
    assert captured.accepts(module, torch.ones(3, 4))
    with pytest.raises(CaptureError, match="captured for a call where mask is None"):
        captured.forward(module, torch.ones(2, 4), torch.ones(4, dtype=torch.bool))
    with pytest.raises(CaptureError, match="captured for a call where x is tensor, 2 dimensions"):
        captured.forward(module, torch.ones(4))
    with torch.no_grad():
        other = -module.lin.bias - 9 if module(torch.ones(2, 4)).mean() > 0 else module.lin.bias + 9
        x = torch.linalg.solve(module.lin.weight, other - module.lin.bias).expand(2, 4)
    with pytest.raises(CaptureError, match=r"captured for bool\(gt\) == .*test_variants.py:\d+"):
        captured.forward(module, x)


def test_autocast_gets_a_variant() -> None:
    class Low(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x @ x.mT
            return y if y.dtype is torch.float32 else y + 1

    module, x = Low(), torch.randn(3, 3)
    forward = Forward(capture(module, (x,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(forward(module, x), module(x))
    assert torch.equal(forward(module, x), module(x))
    assert len(forward.variants) == 2


def test_a_written_input_cannot_be_taken_back() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return x + 1 if x.sum() > 0 else x - 1

    module = Writes()
    forward = Forward(capture(module, (torch.ones(2),)))
    with pytest.raises(CaptureError, match="already changed an input"):
        forward(module, torch.full((2,), -9.0))


def test_a_miss_under_compile_says_what_to_call(pair: tuple[nn.Module, nn.Module]) -> None:
    class Flagged(nn.Module):
        def forward(self, x: Tensor, flag: bool = False) -> Tensor:
            return -x if flag else x + 1

    module = Flagged()
    forward = Forward(capture(module, (torch.ones(2),)))
    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    assert torch.equal(compiled(module, torch.ones(3)), torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="run the model once on such an input beforehand"):
        compiled(module, torch.ones(2), True)
    forward(module, torch.ones(2), True)
    torch.compiler.reset()
    assert torch.equal(compiled(module, torch.ones(2), True), -torch.ones(2))


def test_a_miss_under_export_raises() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run = Forward(capture(nn.Softmax(-1), (torch.ones(2, 2),)))
            self.inner = nn.Softmax(-1)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(self.inner, x)

    with pytest.raises(CaptureError, match="none can be captured while compiling"):
        torch.export.export(Holder(), (torch.ones(2, 2, 2),), strict=False)


def test_threads_capture_one_variant() -> None:
    module = Branches().eval()
    forward = Forward(capture(module, (torch.ones(2, 4),)))
    expected = module(torch.ones(5, 4))
    results: list[Tensor] = []

    def call() -> None:
        results.append(forward(module, torch.ones(5, 4)))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)
    assert len(results) == 4
    assert len(forward.variants) == 2
