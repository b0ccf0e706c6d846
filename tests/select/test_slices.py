"""The slices of fused projections, against a measurement: which rows of the weight move what.

Every row of a weight is changed in turn, and the query, key and value that reach the attention are
watched. Nothing of the code under test takes part in that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.select import ModelMap
from tests import zoo

WIDTH, HEADS, SIZE = 12, 3, 4
PLAIN = F.scaled_dot_product_attention


class Attention(nn.Module):
    """A fused projection of ``rows`` features, split into query, key and value by ``split``."""

    def __init__(self, rows: int, split: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.fused = nn.Linear(WIDTH, rows)
        self.out = nn.Linear(HEADS * SIZE, WIDTH)
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, *gate = self.split(self.fused(x))
        made = F.scaled_dot_product_attention(query, key, value)
        made = made.transpose(1, 2).flatten(2)
        return x + self.out(made * gate[0].sigmoid() if gate else made)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)


def chunked(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(heads(part) for part in x.chunk(3, -1))


def interleaved(x: Tensor) -> tuple[Tensor, ...]:
    """Head by head, each with its query, key and value, as GPT-NeoX and BLOOM store them."""
    return x.unflatten(-1, (HEADS, 3 * SIZE)).transpose(1, 2).chunk(3, -1)


def swapped(x: Tensor) -> tuple[Tensor, ...]:
    """Value first, as no rule of thumb would have it."""
    value, query, key = x.chunk(3, -1)
    return heads(query), heads(key), heads(value)


def multi_query(x: Tensor) -> tuple[Tensor, ...]:
    query, key, value = x.split([HEADS * SIZE, SIZE, SIZE], -1)
    return (
        heads(query),
        heads(key).expand(-1, HEADS, -1, -1),
        heads(value).expand(-1, HEADS, -1, -1),
    )


def rotated(x: Tensor) -> tuple[Tensor, ...]:
    query, key, value = chunked(x)
    angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * torch.ones(SIZE // 2)
    waves = torch.polar(torch.ones_like(angles), angles)

    def turn(y: Tensor) -> Tensor:
        pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * waves).flatten(-2)

    return turn(query), turn(key), value


def normed(x: Tensor) -> tuple[Tensor, ...]:
    query, key, value = chunked(x)
    return F.normalize(query, dim=-1), F.layer_norm(key, (SIZE,)), value


def gated(x: Tensor) -> tuple[Tensor, ...]:
    """Query and gate side by side in each head, as Qwen3-Next has them, then key and value."""
    wide, key, value = x.split([2 * HEADS * SIZE, HEADS * SIZE, HEADS * SIZE], -1)
    query, gate = wide.unflatten(-1, (HEADS, 2 * SIZE)).chunk(2, -1)
    return query.transpose(1, 2), heads(key), heads(value), gate.flatten(2)


CASES = {
    "chunked": (3 * HEADS * SIZE, chunked),
    "interleaved": (3 * HEADS * SIZE, interleaved),
    "swapped": (3 * HEADS * SIZE, swapped),
    "multi_query": ((HEADS + 2) * SIZE, multi_query),
    "rotated": (3 * HEADS * SIZE, rotated),
    "normed": (3 * HEADS * SIZE, normed),
    "gated": (4 * HEADS * SIZE, gated),
}


def measure(call: Callable[[], Any], bump: Callable[[int], None], rows: int) -> dict[str, set[int]]:
    """Letter → the rows that move it, by changing one at a time."""
    seen: list[tuple[Tensor, ...]] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((query, key, value))
        return PLAIN(query, key, value, *args, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(F, "scaled_dot_product_attention", watched)
    moved: dict[str, set[int]] = {"q": set(), "k": set(), "v": set()}
    with torch.no_grad():
        call()
        before = seen[0]
        for row in range(rows):
            seen.clear()
            bump(row)
            call()
            for letter, old, new in zip("qkv", before, seen[0], strict=True):
                if not torch.equal(old, new):
                    moved[letter].add(row)
            bump(row)
    patch.undo()
    return moved


def as_set(part: tuple[int, int] | list[int]) -> set[int]:
    return set(range(*part)) if isinstance(part, tuple) else set(part)


def check(
    model: nn.Module, given: Any, path: str, weight: Tensor, rows: int
) -> dict[str, set[int]]:
    role = ModelMap(model, given).roles[path]
    assert role.name == "attention.qkv"
    along = weight if weight.shape[0] == rows else weight.T

    def bump(row: int) -> None:
        along[row] = -along[row]  # twice gives the very bits back

    args, kwargs = (given.args, given.kwargs) if hasattr(given, "args") else (given, {})
    moved = measure(lambda: model(*args, **kwargs), bump, rows)
    slices = {part: as_set(found) for part, found in role.slices.items()}
    assert {letter: slices[letter] for letter in "qkv"} == moved
    return slices


@pytest.mark.parametrize("case", CASES)
def test_slices_of_a_fused_projection(case: str):
    rows, split = CASES[case]
    model = Attention(rows, split).eval()
    slices = check(model, (torch.randn(2, 5, WIDTH),), "fused", model.fused.weight.data, rows)
    if case == "gated":
        assert slices["gate"] == set(range(rows)) - slices["q"] - slices["k"] - slices["v"]


ZOO = [
    ("gpt2", "transformer.h.0.attn.c_attn"),
    ("timm_vit", "blocks.0.attn.qkv"),
    ("timm_eva", "blocks.0.attn.qkv"),
]


@pytest.mark.parametrize(("name", "path"), ZOO)
def test_slices_in_the_zoo(name: str, path: str):
    model, given = zoo.build(name)
    weight: Any = model.get_submodule(path).weight
    check(model, given, path, weight.data, max(weight.shape))


def test_slices_where_a_softmax_is_written_out():
    role = ModelMap(*zoo.build("timm_swin")).roles["layers.0.blocks.0.attn.qkv"]
    assert role.slices == {"q": (0, 16), "k": (16, 32), "v": (32, 48)}


def test_halves_of_a_fused_gated_unit():
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(WIDTH, 10)
            self.down = nn.Linear(5, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            value, gate = self.both(x).chunk(2, -1)
            return x + self.down(value * F.gelu(gate))

    found = ModelMap(Unit(), torch.randn(2, WIDTH)).roles["both"]
    assert (found.name, found.slices) == ("mlp.gate_in", {"in": (0, 5), "gate": (5, 10)})


def test_a_torch_glu_gates_with_its_second_half():
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(WIDTH, 10)
            self.down = nn.Linear(5, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.glu(self.both(x)))

    found = ModelMap(Unit(), torch.randn(2, WIDTH)).roles["both"]
    assert (found.name, found.slices) == ("mlp.gate_in", {"in": (0, 5), "gate": (5, 10)})
