"""The weighted sums: each backend against float64, on every layout and dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures.shortcuts import Ancre, Mixer, _torch, kernels, weighted_sum
from architectures.shortcuts.kernels import blocked, plain
from tests.architectures.shortcuts.toys import mixed

LAYOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda t: torch.stack((t, t), -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
}
#: Five states of order one; the products sum 120 terms.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-4},  # one rounding to 8 bits
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},  # one rounding to 11 bits
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and an incomplete one, whatever the number of threads."""
    monkeypatch.setattr(blocked, "BLOCK", 50 // torch.get_num_threads())
    torch.manual_seed(0)


def tensors(layout: str, dtype: torch.dtype, count: int) -> list[Tensor]:
    return [LAYOUT[layout](torch.randn(2, 3, 4, 5)).to(dtype) for _ in range(count)]


def close(ours: Tensor | None, exact: Tensor | None, dtype: torch.dtype) -> None:
    assert ours is not None
    assert exact is not None
    torch.testing.assert_close(ours.double(), exact, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUT)
@pytest.mark.parametrize("other", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", [blocked, plain], ids=["blocked", "plain"])
def test_sums_and_gradients(layout: str, other: str, dtype: torch.dtype, backend: Any) -> None:
    (x, gradient), rest = tensors(layout, dtype, 2), tensors(other, dtype, 3)
    factors, scale = torch.tensor([0.5, -2.0, 0.25]), torch.tensor(0.75)
    exact_x, exact_gradient, *exact = (t.double() for t in (x, gradient, *rest))
    weighted = sum(float(c) * t for c, t in zip(factors, exact, strict=True))

    total = backend.combine(x, None, factors, rest)
    close(total, exact_x + weighted, dtype)
    if layout in {"contiguous", "channels_last"}:
        assert total.stride() == x.stride()
    close(backend.combine(x, scale, factors, rest), 0.75 * exact_x + weighted, dtype)

    products = torch.stack([(t * exact_x).sum() for t in exact])
    for start, exact_start in ((gradient, exact_gradient), (None, torch.zeros_like(exact_x))):
        total, sums = backend.pull(x, start, factors, rest)
        close(total, exact_start + weighted, dtype)
        close(sums, products, torch.float32)

    needs = {"need_states": [True, False, True], "need_products": True}
    totals, sums = backend.push(x, factors, rest, **needs)
    close(totals[0], 0.5 * exact_x, dtype)
    assert totals[1] is None
    close(totals[2], 0.25 * exact_x, dtype)
    close(sums, products, torch.float32)


@pytest.mark.parametrize("backend", [blocked, plain], ids=["blocked", "plain"])
def test_only_what_is_needed(backend: Any) -> None:
    x, *rest = tensors("contiguous", torch.float32, 3)
    factors = torch.ones(2)
    assert backend.pull(x, None, factors, rest, need_state=False)[0] is None
    assert backend.pull(x, None, factors, rest, need_products=False)[1] is None
    totals, sums = backend.push(x, factors, rest, need_states=[True, True], need_products=False)
    assert sums is None
    assert None not in totals


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    base, *states = (torch.randn(shape, requires_grad=True) for _ in range(3))
    total = weighted_sum(base, torch.tensor([2.0, 3.0]), states)
    torch.testing.assert_close(total, base + 2 * states[0] + 3 * states[1])
    gradients = torch.autograd.grad(total.sum(), [base, *states])
    assert [g.shape for g in gradients] == [shape] * 3


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 4, 1)])
def test_channels_last_stays(shape: tuple[int, ...]) -> None:
    stack = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(3)]).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    mixer = Mixer(Ancre(3))
    output = mixed(stack, mixer(), mixer.support, x)[-1]
    assert output.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_what_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has blocks; where Triton is missing, a CUDA device has plain operations."""

    class Cuda(Tensor):
        device = torch.device("cuda")
        is_cuda = True

    state: Any = torch.Tensor._make_subclass(Cuda, torch.ones(3))
    assert kernels._for(torch.ones(3)) is blocked
    monkeypatch.setattr(_torch, "has_triton", lambda: False)
    assert kernels._for(state) is plain
    assert kernels._for(torch.ones(3, device="meta")) is plain


INTERPRETED = """
import torch
from architectures.shortcuts.kernels import fused, plain

fused.BLOCK, fused.MOST = 64, 4
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for count in (0, 1, 3, 4, 9):
        x, start, *rest = (torch.randn(7, 33).to(dtype) for _ in range(count + 2))
        factors = torch.randn(count)
        # One rounding to bfloat16; sums of 231 products in float32.
        close = {"rtol": 8e-3 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-4}
        for scale in (torch.tensor(0.3), None):
            sums = (backend.combine(x, scale, factors, rest) for backend in (fused, plain))
            torch.testing.assert_close(*sums, **close)
        for begin in (None, start) if count else ():
            ours, theirs = (b.pull(x, begin, factors, rest) for b in (fused, plain))
            torch.testing.assert_close(ours, theirs, **close)
            assert fused.pull(x, begin, factors, rest, need_state=False)[0] is None
            assert fused.pull(x, begin, factors, rest, need_products=False)[1] is None
identity = torch.zeros(9)
rest = [torch.randn(7, 33).bfloat16() for _ in range(9)]
assert torch.equal(fused.combine(rest[0], None, identity, rest), rest[0])
"""


@pytest.mark.skipif(not _torch.has_triton(), reason="Triton is not installed on this platform")
def test_triton_kernels_interpreted() -> None:
    """Without a GPU: Triton's interpreter runs what a GPU would, in NumPy."""
    subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_triton_kernels_on_a_gpu(dtype: torch.dtype) -> None:
    from architectures.shortcuts.kernels import fused

    x, start, *rest = (t.cuda() for t in tensors("contiguous", dtype, 9))
    factors = torch.randn(7, device="cuda")
    torch.testing.assert_close(
        fused.combine(x, None, factors, rest).double(),
        plain.combine(x, None, factors, rest).double(),
        **TOLERANCE[dtype],
    )
    for ours, theirs in zip(
        fused.pull(x, start, factors, rest), plain.pull(x, start, factors, rest), strict=True
    ):
        close(ours, theirs.double(), dtype)
