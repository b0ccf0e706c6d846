"""RefLoRA against golden vectors, arithmetic of 60 digits, and the invariance it is named for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.optim import Factors, linalg
from surgery.optim.reflora import RefLoRA, precondition

GOLDEN = Path(__file__).parents[1] / "golden" / "reflora.safetensors"


def golden(file: Path, index: int) -> dict[str, Tensor]:
    prefix = f"{index}."
    tensors = load_file(file)
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def conditioned(rows: int, columns: int, condition: float, seed: int) -> Tensor:
    """A matrix (rows, columns), rows the fewer, with singular values from 1 to 1/condition."""
    draw = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, rows, generator=draw, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, rows, generator=draw, dtype=torch.float64))
    values = torch.logspace(0, -math.log10(condition), rows, dtype=torch.float64)
    return (u * values) @ v.T


def exact(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor) -> tuple[Tensor, Tensor]:
    """The same in arithmetic of 60 digits, from eigenvalues."""
    with mp.workdps(60):
        a, b, ga, gb = (mp.matrix(each.double().tolist()) for each in (A, B, grad_A, grad_B))
        lower = mp.cholesky(a * a.T)
        values, vectors = mp.eigsy(lower.T * (b.T * b) * lower)
        roots = [mp.sqrt(value) for value in values]
        inverse = lower**-1
        S = inverse.T * vectors * mp.diag(roots) * vectors.T * inverse
        S_inverse = lower * vectors * mp.diag([1 / root for root in roots]) * vectors.T * lower.T
        return _tensor(S_inverse * ga), _tensor(gb * S)


def _tensor(matrix: Any) -> Tensor:
    return torch.tensor([[float(x) for x in row] for row in matrix.tolist()], dtype=torch.float64)


def pair(rank: int, columns: int, rows: int, seed: int = 0, *stack: int) -> list[Tensor]:
    """Factors and gradients in float64."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(rank, columns), (rows, rank)] * 2
    return [torch.randn(*stack, *shape, generator=draw, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("index", range(3))
def test_golden_vectors(index):
    tensors = golden(GOLDEN, index)
    found = precondition(*(tensors[name] for name in ("A", "B", "grad_A", "grad_B")))
    # The authors add 2e-16 to eigenvalues, which nobody sees at this tolerance.
    for new, name in zip(found, ("out_grad_A", "out_grad_B"), strict=True):
        assert difference(new, tensors[name]) < 1e-9


@pytest.mark.parametrize("condition", [(1.0, 1.0), (1e4, 1.0), (1.0, 1e4), (1e4, 1e4)])
@pytest.mark.parametrize("kind", ["any gradients", "gradients of a weight"])
def test_float32_factors_of_a_high_condition_number(condition, kind):
    A = conditioned(8, 24, condition[0], 0).float()
    B = conditioned(8, 20, condition[1], 1).T.contiguous().float() * 1e-2
    draw = torch.Generator().manual_seed(2)
    if kind == "any gradients":
        grad_A, grad_B = torch.randn(8, 24, generator=draw), torch.randn(20, 8, generator=draw)
    else:
        # Their large parts are where S⁻¹ and S are small: what rounding adds elsewhere shows.
        G = torch.randn(20, 24, generator=draw, dtype=torch.float64)
        grad_A, grad_B = (B.double().T @ G).float(), (G @ A.double().T).float()
    found = precondition(A, B, grad_A, grad_B)
    for new, expected in zip(found, exact(A, B, grad_A, grad_B), strict=True):
        assert new.dtype == torch.float32
        assert difference(new, expected) <= 1e-6


@given(
    rank=st.integers(1, 6),
    more=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    seed=st.integers(0, 2**16),
    spread=st.floats(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_a_step_of_gradient_descent_is_that_of_any_other_factorisation(rank, more, seed, spread):
    A, B, _, _ = pair(rank, rank + more[0], rank + more[1], seed)
    draw = torch.Generator().manual_seed(seed + 1)
    G = torch.randn(B.shape[0], A.shape[1], generator=draw, dtype=torch.float64)
    mix, _ = torch.linalg.qr(torch.randn(rank, rank, generator=draw, dtype=torch.float64))
    P = mix * torch.logspace(0, spread, rank, dtype=torch.float64)

    def change(A: Tensor, B: Tensor) -> Tensor:
        """What a step of 0.1 makes of the product, to which G is the gradient."""
        grad_A, grad_B = precondition(A, B, B.T @ G, G @ A.T)
        return (B - 0.1 * grad_B) @ (A - 0.1 * grad_A) - B @ A

    expected = change(A, B)
    conditions = torch.linalg.cond(A) * torch.linalg.cond(B) * torch.linalg.cond(P)
    found = change(P @ A, B @ torch.linalg.inv(P))
    assert difference(found, expected) < 1e-13 * conditions.item() ** 2


def test_the_step_is_that_of_the_pair_with_equal_gram_matrices():
    A, B, _, _ = pair(4, 9, 7)
    G = torch.randn(7, 9, dtype=torch.float64)
    left, values, right = torch.linalg.svd(B @ A)
    root = values[:4].sqrt()
    balanced_A, balanced_B = root[:, None] * right[:4], left[:, :4] * root
    grad_A, grad_B = precondition(A, B, B.T @ G, G @ A.T)
    first_order = B @ grad_A + grad_B @ A
    expected = balanced_B @ (balanced_B.T @ G) + (G @ balanced_A.T) @ balanced_A
    assert difference(first_order, expected) < 1e-12


def deficient(kind: str) -> list[Tensor]:
    A, B, grad_A, grad_B = pair(4, 9, 7)
    if kind == "B is zero":
        B = torch.zeros_like(B)
    elif kind == "A is zero":
        A = torch.zeros_like(A)
    elif kind == "both are zero":
        A, B = torch.zeros_like(A), torch.zeros_like(B)
    elif kind == "B has rank 1":
        B = B[:, :1] @ torch.ones(1, 4, dtype=torch.float64)
    elif kind == "A has equal rows":
        A = A[:1].expand(4, 9).clone()
    elif kind == "a column of B is zero":
        B = B * torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    elif kind == "fewer rows than the rank":
        B, grad_B = B[:3], grad_B[:3]
    return [A, B, grad_A, grad_B]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "zero"),
    [
        ("B is zero", True),
        ("A is zero", True),
        ("both are zero", True),
        ("B has rank 1", False),
        ("A has equal rows", False),
        ("a column of B is zero", False),
        ("fewer rows than the rank", False),
    ],
)
def test_rank_deficient_factors_get_the_best_multiple_of_the_identity(kind, zero, dtype):
    A, B, grad_A, grad_B = (each.to(dtype) for each in deficient(kind))
    ratio = 1.0 if zero else (B.double().norm() / A.double().norm()).item()
    new_A, new_B = precondition(A, B, grad_A, grad_B)
    tolerance = torch.finfo(dtype).eps
    assert difference(new_A, grad_A.double() / ratio) <= tolerance
    assert difference(new_B, grad_B.double() * ratio) <= tolerance


@given(
    seed=st.integers(0, 2**16),
    rank=st.integers(1, 8),
    kept=st.integers(0, 8),
    scale=st.floats(-30, 15),
)
@settings(max_examples=60, deadline=None)
def test_factors_of_any_rank_and_scale_give_finite_gradients(seed, rank, kept, scale):
    A, B, grad_A, grad_B = (each.float() for each in pair(rank, 11, 9, seed))
    B = (B[:, :kept] @ torch.randn(min(kept, rank), rank)) * 10.0**scale
    new = precondition(A, B, grad_A * 10.0 ** min(scale, 0), grad_B)
    assert all(each.isfinite().all() for each in new)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_factors_are_computed_with_in_float64(dtype):
    A, B, grad_A, grad_B = (each.to(dtype) for each in pair(8, 24, 20))
    found = precondition(A, B, grad_A, grad_B)
    expected = precondition(*(each.double() for each in (A, B, grad_A, grad_B)))
    for new, wide in zip(found, expected, strict=True):
        assert torch.equal(new, wide.to(dtype))


def test_float16_gradients_that_would_overflow_stay_finite():
    A, B, grad_A, grad_B = (each.half() for each in pair(4, 9, 7))
    new_A, _ = precondition(A * 100, B * 1e-3, grad_A * 100, grad_B)
    assert new_A.isfinite().all()
    assert new_A.abs().max() == torch.finfo(torch.float16).max


def test_leading_dimensions_are_a_batch():
    stacked = pair(4, 9, 7, 0, 2, 3)
    found = precondition(*stacked)
    for index in ((0, 0), (1, 2)):
        single = precondition(*(each[index] for each in stacked))
        for new, expected in zip(found, single, strict=True):
            assert difference(new[index], expected) < 1e-13


def test_shapes_that_do_not_fit_are_refused():
    A, B, grad_A, grad_B = pair(4, 9, 7)
    with pytest.raises(ValueError, match=r"got \(4, 9\), \(7, 4\), \(7, 4\), \(4, 9\)"):
        precondition(A, B, grad_B, grad_A)
    with pytest.raises(ValueError, match="lora_A must be"):
        precondition(A[:3], B, grad_A[:3], grad_B)


SHAPES = [(4, 9, 7), (4, 12, 7), (4, 9, 7), (2, 9, 7), (4, 5, 6, 3)]


def adapters(dtype: torch.dtype = torch.float64) -> list[Factors]:
    """Of two ranks, several shapes, one a stack of three matrices."""
    found = []
    for index, (rank, columns, rows, *stack) in enumerate(SHAPES):
        shapes = [(*stack, rank, columns), (*stack, rows, rank)] * 2
        A, B, grad_A, grad_B = (torch.randn(shape, dtype=dtype) for shape in shapes)
        each = Factors(f"layer{index}", nn.Parameter(A), nn.Parameter(B), 0.5 + index)
        each.A.grad, each.B.grad = grad_A, grad_B
        found.append(each)
    return found


@pytest.mark.parametrize("singly", [True, False])
def test_the_rule_gives_every_adapter_what_the_function_gives(singly, monkeypatch):
    # Elsewhere than on the CPU adapters of one shape are one product.
    monkeypatch.setattr(linalg, "_one_by_one", lambda tensors: singly)
    torch.manual_seed(0)
    found = adapters()
    expected = [precondition(each.A, each.B, each.A.grad, each.B.grad) for each in found]
    optimizer = torch.optim.SGD([p for each in found for p in (each.A, each.B)])
    RefLoRA(found, warmup=0).before(optimizer)
    for each, (grad_A, grad_B) in zip(found, expected, strict=True):
        assert difference(each.A.grad, grad_A) < 1e-12
        assert difference(each.B.grad, grad_B) < 1e-12


def test_warm_up_and_interval_leave_gradients_plain():
    A, B, grad_A, grad_B = pair(4, 9, 7)
    each = Factors("layer", nn.Parameter(A), nn.Parameter(B), 1.0)
    optimizer = torch.optim.SGD([each.A, each.B], lr=1e-3)
    RefLoRA([each], warmup=2, interval=3).attach(optimizer)
    replaced = []
    for _ in range(9):
        each.A.grad, each.B.grad = grad_A.clone(), grad_B.clone()
        optimizer.step()
        replaced.append(not torch.equal(each.A.grad, grad_A))
    assert replaced == [False, False, True, False, False, True, False, False, True]


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="warmup must be 0 or more"):
        RefLoRA(adapters(), warmup=-1)
    with pytest.raises(ValueError, match="interval 1 or more"):
        RefLoRA(adapters(), interval=0)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_b_leaves_zero_without_a_warm_up(kind):
    torch.manual_seed(0)
    target = torch.randn(7, 9)
    each = Factors("layer", nn.Parameter(torch.randn(4, 9)), nn.Parameter(torch.zeros(7, 4)), 1.0)
    optimizer = kind([each.A, each.B], lr=0.05)
    RefLoRA([each], warmup=0).attach(optimizer)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (each.B @ each.A - target).square().sum() / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    best = torch.linalg.svdvals(target)[4:].square().sum() / 2
    assert losses[-1] - best < 0.5 * (losses[0] - best)


class Calls(TorchDispatchMode):
    """Counts what runs a kernel: operations other than views and questions to a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


def test_elsewhere_than_on_the_cpu_the_number_of_kernels_is_that_of_shapes_not_of_adapters():
    counts = []
    for repeats in (1, 10):
        with FakeTensorMode(), torch.device("cuda"):
            found = [each for _ in range(repeats) for each in adapters(torch.float32)]
            rule = RefLoRA(found, warmup=0)
            optimizer = torch.optim.SGD([found[0].A], foreach=False)
            with torch.no_grad(), Calls() as calls:
                rule.before(optimizer)
        counts.append(calls.count)
    assert counts[1] == counts[0]


@pytest.mark.parametrize("call", ["function", "rule"])
def test_nothing_waits_for_the_device(call):
    with FakeTensorMode():
        tensors = [torch.randn(*shape, device="cuda") for shape in [(4, 9), (7, 4), (4, 9), (7, 4)]]
        with pytest.raises(DataDependentOutputException):
            tensors[0].sum().item()
        if call == "function":
            precondition(*tensors)
            return
        each = Factors("layer", nn.Parameter(tensors[0]), nn.Parameter(tensors[1]), 1.0)
        each.A.grad, each.B.grad = tensors[2:]
        optimizer = torch.optim.SGD([each.A, each.B], foreach=False)
        RefLoRA([each, each], warmup=0).before(optimizer)
