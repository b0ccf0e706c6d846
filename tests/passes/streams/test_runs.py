"""Which blocks make a run, on small models of the forms that were found in the libraries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import Rule, Stack, SurgeryError
from surgery.passes.shortcuts import Shortcuts
from surgery.passes.streams import all_segments

IDENTITY = Shortcuts(topology="ancre", init="identity")


class Block(nn.Module):
    """``x + W relu(V x)``; an option has a name that the runtime might use itself."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor | None = None, function: float = 1.0) -> Tensor:
        out = x + function * self.down(self.up(x).relu())
        return out if skip is None else out + skip


class Shared(nn.Module):
    """One block that is called three times, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.blocks[0](x)
        return x


class Siamese(nn.Module):
    """One encoder of one block, used on two inputs one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.encoder(x))


class Named(nn.Module):
    """Blocks whose arguments are called as those of the runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, skip=x, function=0.5)
        return x


class Listed(nn.Module):
    """Blocks under names of their own in a module that lists its children (RegNet's stages)."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("b1", "b2", "b3"):
            self.add_module(name, Block())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        for _, block in self.named_children():
            x = block(x)
        return x


class Stage(nn.Module):
    """Two blocks and what halves the length."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x[:, ::2]


class Stages(nn.Module):
    """Stages of one width: from their weights alone they look like the blocks of a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class Pair(nn.Module):
    """Two streams; the last block hands the second one through (Mochi)."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Linear(4, 4), nn.Linear(4, 4), last

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        mean = y.mean(1, keepdim=True)
        return x + self.one(x + mean), y if self.last else y + self.other(y)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair(last=at == 2) for at in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x.flip(1)
        for block in self.blocks:
            x, y = block(x, y)
        return x


def _members(model: nn.Module) -> dict[str, tuple[str, ...]]:
    return {holder: segment.members for holder, _, segment in all_segments(model)}


@pytest.mark.parametrize(
    ("cls", "members"),
    [
        (Shared, {"blocks": ("0", "0", "0")}),
        (Named, {"blocks": ("0", "1", "2")}),
        (Listed, {"": ("b1", "b2", "b3")}),
        (Stages, {"stages.0.blocks": ("0", "1"), "stages.1.blocks": ("0", "1")}),
        (Pairs, {"blocks": ("0", "1", "2")}),
    ],
)
def test_runs(cls: type[nn.Module], members: dict[str, tuple[str, ...]]) -> None:
    model, x = cls().eval(), torch.randn(2, 8, 4)
    before = model(x)
    surgery.apply(model, Rule(IDENTITY, where=Stack("all")), example=x)
    assert _members(model) == members
    assert torch.equal(model(x), before)
    surgery.undo(model)
    assert torch.equal(model(x), before)


def test_a_shared_block_is_mixed_by_calls() -> None:
    model, x = Shared().double().eval(), torch.randn(2, 8, 4, dtype=torch.float64)
    surgery.apply(model, Rule(IDENTITY, where=Stack("all")), example=x)
    segment = next(segment for *_, segment in all_segments(model))
    with torch.no_grad():
        segment.double()
        for parameter in segment.parameters():
            parameter.normal_(std=0.01)
        weights, block = segment(), model.blocks[0]
        states, state = list[Tensor](), x
        for k in range(3):
            states.append(state)
            mixed = sum((weights[k, j] * states[j] for j in range(k + 1)), torch.zeros(()))
            state = block(state) + mixed
        torch.testing.assert_close(model(x), state, rtol=1e-14, atol=1e-14)


def test_both_streams_of_a_pair_are_mixed() -> None:
    model = Pairs().eval()
    surgery.apply(model, Rule(IDENTITY, where=Stack("all")), example=torch.randn(2, 8, 4))
    assert [len(segment.streams) for *_, segment in all_segments(model)] == [2]


def test_calls_of_several_forwards_are_no_run() -> None:
    model = Siamese().eval()
    with pytest.raises(SurgeryError, match="no two in a row"):
        surgery.plan(model, Rule(IDENTITY, where=Stack("all")), example=torch.randn(2, 8, 4))
