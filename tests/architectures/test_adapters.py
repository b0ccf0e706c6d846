"""What an adapter is, apart from any host: its tensors, their first values, the change it makes."""

from __future__ import annotations

import math

import pytest
import torch

from architectures.adapters import Adapter, LoRA, Matrix, Sliced

# weight shape, stacked, transposed → (stack, rows, columns)
SHAPES = [
    ((5, 7), False, False, ((), 5, 7)),
    ((7, 5), False, True, ((), 5, 7)),
    ((6, 4, 3), False, False, ((), 6, 12)),
    ((6, 4, 3, 2), False, False, ((), 6, 24)),
    ((6, 4, 3), True, False, ((6,), 4, 3)),
    ((2, 6, 4, 3), True, False, ((2, 6), 4, 3)),
]


@pytest.mark.parametrize(("shape", "stacked", "transposed", "expected"), SHAPES)
def test_matrix_folds_and_unfolds(
    shape: tuple[int, ...],
    stacked: bool,
    transposed: bool,
    expected: tuple[tuple[int, ...], int, int],
) -> None:
    matrix = Matrix.of(shape, stacked=stacked, transposed=transposed)
    assert (matrix.stack, matrix.rows, matrix.columns) == expected
    weight = torch.randn(shape)
    folded = matrix.fold(weight)
    assert folded.shape == (*matrix.stack, matrix.rows, matrix.columns)
    assert torch.equal(matrix.unfold(folded), weight)


@pytest.mark.parametrize(("shape", "stacked", "transposed", "_"), SHAPES)
def test_lora_tensors_are_what_it_declares(
    shape: tuple[int, ...], stacked: bool, transposed: bool, _: object
) -> None:
    matrix = Matrix.of(shape, stacked=stacked, transposed=transposed)
    adapter = LoRA(matrix, rank=2, scaling=0.5, dtype=torch.float64)
    made = {name: tuple(tensor.shape) for name, tensor in adapter.named_parameters()}
    assert made == LoRA.tensors(matrix, 2)
    assert all(tensor.dtype == torch.float64 for tensor in adapter.parameters())


def test_lora_starts_without_a_change() -> None:
    adapter = LoRA(Matrix.of((40, 30), stacked=False), rank=8, scaling=2.0)
    adapter.start("kaiming", torch.Generator().manual_seed(0), None)
    A, B = adapter.factors()
    assert torch.equal(B, torch.zeros(40, 8))
    bound = 1 / math.sqrt(30)
    assert A.abs().max() <= bound
    # Standard deviation of a uniform distribution; 240 draws are within 15% of it.
    assert math.isclose(A.std().item(), bound / math.sqrt(3), rel_tol=0.15)
    assert torch.equal(adapter.change(torch.randn(40, 30)), torch.zeros(40, 30))


def test_gaussian_init_has_deviation_of_one_over_rank() -> None:
    adapter = LoRA(Matrix.of((40, 300), stacked=False), rank=8, scaling=1.0)
    adapter.start("gaussian", torch.Generator().manual_seed(0), None)
    assert math.isclose(adapter.lora_A.std().item(), 1 / 8, rel_tol=0.05)


def test_first_values_depend_on_the_generator_only() -> None:
    def drawn(dtype: torch.dtype) -> torch.Tensor:
        adapter = LoRA(Matrix.of((6, 10), stacked=False), rank=3, scaling=1.0, dtype=dtype)
        torch.rand(3)  # the global generator has no say
        adapter.start("kaiming", torch.Generator().manual_seed(7), None)
        return adapter.lora_A.detach()

    assert torch.equal(drawn(torch.float32), drawn(torch.float32))
    assert torch.equal(drawn(torch.bfloat16), drawn(torch.float32).bfloat16())
    before = torch.random.get_rng_state()
    adapter = LoRA(Matrix.of((6, 10), stacked=False), rank=3, scaling=1.0)
    adapter.start("gaussian", torch.Generator().manual_seed(7), None)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_meta_adapters_have_shapes_only() -> None:
    adapter = LoRA(Matrix.of((6, 10), stacked=False), rank=3, scaling=1.0, device="meta")
    assert adapter.start("kaiming", None, None) is None
    assert all(tensor.is_meta for tensor in adapter.parameters())


def test_change_is_scaled_product() -> None:
    adapter = _random(LoRA(Matrix.of((3, 5, 4), stacked=True), rank=2, scaling=1.5))
    A, B = adapter.factors()
    expected = torch.stack([1.5 * B[i] @ A[i] for i in range(3)])
    torch.testing.assert_close(adapter.change(torch.zeros(3, 5, 4)), expected)
    wide = adapter.change(torch.zeros(3, 5, 4), dtype=torch.float64)
    assert wide.dtype == torch.float64


def test_slices_change_their_rows_only() -> None:
    parts = {
        "q": (((0, 4),), _random(LoRA(Matrix.of((4, 5), stacked=False), rank=2, scaling=0.5))),
        "v": (
            ((6, 7), (9, 12)),
            _random(LoRA(Matrix.of((4, 5), stacked=False), rank=2, scaling=0.5)),
        ),
    }
    sliced = Sliced(parts, rows=12)
    expected = torch.zeros(12, 5, dtype=torch.float64)
    expected[0:4] = parts["q"][1].change(torch.zeros(4, 5))
    v = parts["v"][1].change(torch.zeros(4, 5))
    expected[6:7], expected[9:12] = v[:1], v[1:]
    # Zeros times zeros add nothing, and the products are the same: equal to the last bits.
    torch.testing.assert_close(sliced.change(torch.zeros(12, 5)), expected, rtol=0, atol=1e-15)
    sliced.change(torch.zeros(12, 5)).sum().backward()
    assert all(tensor.grad is not None for tensor in sliced.parameters())
    assert list(dict(sliced.named_parameters())) == [
        "q.lora_A",
        "q.lora_B",
        "v.lora_A",
        "v.lora_B",
    ]


def test_plain_adapters_have_no_gain() -> None:
    adapter = LoRA(Matrix.of((4, 5), stacked=False), rank=2, scaling=1.0)
    assert not adapter.scales_rows
    with pytest.raises(NotImplementedError, match="LoRA does not scale rows"):
        Adapter.gain(adapter, torch.zeros(4, 5))


def test_repr_says_what_it_is() -> None:
    adapter = LoRA(Matrix.of((4, 5), stacked=False), rank=2, scaling=0.5, dropout=0.1)
    assert repr(adapter) == "LoRA(rank=2, scaling=0.5, dropout=0.1)"


def _random(adapter: LoRA) -> LoRA:
    adapter.double()
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.normal_()
    return adapter
