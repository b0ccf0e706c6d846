"""Merging a few rows at a time gives what merging the whole weight gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from architectures.adapters import SORSA, DoRA, LoRA, Matrix, Method, PiSSA, Sliced
from surgery.conversion.changes import Merge
from surgery.conversion.layout import contiguous_block
from surgery.passes.hosts import Bank, merge_into
from surgery.passes.hosts.bank import Family

LINEAR = Matrix.of((12, 10), stacked=False)
CONV = Matrix.of((12, 2, 3, 3), stacked=False)
STACK = Matrix.of((3, 12, 10), stacked=True)
TRANSPOSED = Matrix.of((10, 12), stacked=False, transposed=True)

#: Name → matrix, methods that count, whether rows suffice.
CASES: dict[str, tuple[Matrix, list[type[Method]], bool]] = {
    "linear": (LINEAR, [LoRA], True),
    "two": (LINEAR, [LoRA, LoRA], True),
    "convolution": (CONV, [LoRA], True),
    "stack": (STACK, [LoRA], True),
    "transposed": (TRANSPOSED, [LoRA], True),
    "gain": (LINEAR, [DoRA], True),
    "gain and plain": (LINEAR, [DoRA, LoRA], True),
    "gain of a convolution": (CONV, [DoRA], True),
    "gain of a stack": (STACK, [DoRA], False),
    "gain, transposed": (TRANSPOSED, [DoRA], False),
    "three factors": (LINEAR, [SORSA], True),
}


def made(kind: type[Method], matrix: Matrix, seed: int) -> Method:
    generator = torch.Generator().manual_seed(seed)
    method = kind(matrix, rank=2, scaling=1.5, dtype=torch.float32)
    with torch.no_grad():
        for tensor in (*method.parameters(), *method.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return method


def weight(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    return torch.randn(matrix.shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def by_rows(merge: Merge, stored: Tensor, step: int) -> Tensor:
    rows = stored.reshape(-1, merge.columns)
    room = torch.full(rows[:step].shape, torch.nan)
    parts: list[Tensor] = []
    for at in range(0, len(rows), step):
        part = rows[at : at + step]
        parts.append(merge.rows(part, at, room[: len(part)]).clone())
    return torch.cat(parts).reshape(stored.shape)


@pytest.mark.parametrize("step", [1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_whole(case: str, dtype: torch.dtype, step: int) -> None:
    matrix, kinds, suffices = CASES[case]
    adding = [(made(kind, matrix, seed), 1.0 - 0.4 * seed) for seed, kind in enumerate(kinds)]
    merge, stored = Merge(matrix, adding), weight(matrix, dtype)
    assert merge.by_rows == suffices
    whole = merge.whole(stored)
    if suffices:
        # Products of other shapes may be summed in another order.
        torch.testing.assert_close(by_rows(merge, stored, step), whole, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_whole_is_the_merge_in_memory(case: str) -> None:
    matrix, kinds, _ = CASES[case]
    bank = Bank(matrix, Family(), parameter="weight", trained=False, keep_base="none")
    for number, kind in enumerate(kinds):
        bank.add_module(str(number), made(kind, matrix, number))
    mix = tuple((str(number), 1.0) for number in range(len(kinds)))
    stored = weight(matrix, torch.bfloat16)
    wanted = nn.Parameter(stored.clone(), requires_grad=False)
    merge_into(wanted, bank, mix)
    found = Merge(matrix, bank.contributions(mix)).whole(stored)
    assert torch.equal(found.to(torch.bfloat16), wanted)


@pytest.mark.parametrize("kind", [PiSSA, SORSA])
def test_what_an_adapter_started_from_is_taken_out_first(kind: type[Method]) -> None:
    method, stored = made(kind, LINEAR, 0), weight(LINEAR, torch.bfloat16)
    merge = Merge(LINEAR, [(method, 1.0)], [method])
    rest = method.without_beginning(stored)
    wanted = rest.float() + method.delta(torch.float32)
    torch.testing.assert_close(by_rows(merge, stored, 5), wanted, rtol=1e-6, atol=1e-5)
    assert torch.equal(merge.whole(stored), wanted)


def test_slices_of_a_fused_weight() -> None:
    narrow = Matrix.of((4, 10), stacked=False)
    parts = {
        "q": (((0, 4),), made(LoRA, narrow, 0)),
        "v": (((8, 12),), made(LoRA, narrow, 1)),
    }
    merge = Merge(LINEAR, [(Sliced(parts, 12), 1.0)])
    stored = weight(LINEAR, torch.float32)
    torch.testing.assert_close(by_rows(merge, stored, 5), merge.whole(stored))
    assert torch.equal(merge.whole(stored)[4:8], stored[4:8])


@pytest.mark.parametrize(
    ("index", "start"),
    [
        ((1,), 20),
        ((slice(1, 2),), 20),
        ((1, slice(2, 4)), 30),
        ((slice(0, 3), slice(0, 4)), 0),
        ((slice(0, 2), slice(0, 2)), None),
        ((slice(0, 3), 1), None),
        ((0, slice(0, 4), slice(0, 2)), None),
        ((slice(0, 3, 2),), None),
    ],
)
def test_blocks_in_one_piece(index: tuple[int | slice, ...], start: int | None) -> None:
    values = torch.arange(60).reshape(3, 4, 5)
    assert contiguous_block((3, 4, 5), index) == start
    if start is not None:
        block = values[index].reshape(-1)
        assert torch.equal(block, values.reshape(-1)[start : start + len(block)])
