"""A captured forward against the module's own, over everything a forward may do.

Each case is a module and two calls: the graph of the first must give the same bits for the second,
of another batch and length, without capturing again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from surgery.capture import Forward, capture
from surgery.errors import CaptureError
from tests.capture.compare import assert_same, tensors_in

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:FutureWarning",  # one case is a scripted function
    "ignore:None of the inputs have requires_grad:UserWarning",  # a re-entrant checkpoint
)


@dataclasses.dataclass(frozen=True)
class Case:
    kind: type[nn.Module]
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    train: bool = False
    inline: tuple[str, ...] = ()
    variants: int = 1


CASES: list[Case] = []


def case(
    *extra: Callable[[int, int], Any],
    second: tuple[int, int] = (3, 7),
    train: bool = False,
    inline: tuple[str, ...] = (),
    variants: int = 1,
    **keywords: Callable[[int, int], Any],
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a module called on a (batch, length, 8) tensor and whatever ``extra`` makes."""

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        calls = tuple(
            (
                (_noise(batch, length, 8), *(make(batch, length) for make in extra)),
                {name: make(batch, length) for name, make in keywords.items()},
            )
            for batch, length in ((2, 5), second)
        )
        CASES.append(Case(kind, calls, train, inline, variants))
        return kind

    return register


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.heads = 2


@case()
class Factories(Base):
    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        position = torch.arange(length, device=x.device)
        ones = torch.ones(batch, length, 1, dtype=x.dtype) * torch.full((length, 1), length)
        lower = torch.ones(length, length, dtype=torch.bool).tril()
        filled = torch.empty(batch).fill_(2.0)[:, None, None]
        grid = torch.linspace(0, 1, length)[:, None] + torch.tensor([length * 1.0])
        fresh = x.new_zeros(length, width) + torch.zeros_like(x)
        return self.lin(x) * ones + position[:, None] + lower.sum() + filled + grid + fresh


@case(lambda batch, length: torch.tensor(batch))
class Timestep(Base):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if len(t.shape) == 0:
            t = t[None].to(x.device)
        t = t.expand(x.shape[0])
        frequency = torch.exp(-math.log(10000) * torch.arange(4, dtype=torch.float32) / 4)
        angle = t[:, None].float() * frequency[None]
        return x + torch.cat([angle.sin(), angle.cos()], -1)[:, None]


@case()
class Einops(Base):
    def __init__(self) -> None:
        super().__init__()
        self.split = Rearrange("b n (h d) -> b h n d", h=2)

    def forward(self, x: Tensor) -> Tensor:
        query = einops.rearrange(self.lin(x), "b n (h d) -> b h n d", h=self.heads)
        key = self.split(x)
        weights = torch.einsum("bhid,bhjd->bhij", query, key).softmax(-1)
        mixed = einops.rearrange(weights @ key, "b h n d -> b n (h d)")
        return einops.reduce(mixed, "b n c -> b c", "mean") + einops.repeat(x[:, 0], "b c -> b c")


class Attention(Base):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


case(train=True)(Attention)
case(train=True, inline=("attention",))(Attention)
case(inline=("attention",))(Attention)


@functools.lru_cache
def _table(length: int, width: int) -> Tensor:
    return torch.arange(length * width).reshape(length, width).float()


@case(second=(3, 5))
class CachedHelper(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + _table(x.shape[1], x.shape[2])


@case()
class Contexts(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = self.lin(x) @ x.transpose(-1, -2)
        with torch.no_grad():
            mean = low.float().mean()
        with torch.autocast("cpu", enabled=False):
            return low, self.other(x.float()) + mean


@case()
class InPlace(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.lin(x.clone())
        y += 1
        y[:, 0] = 0
        y[..., 1:3].mul_(2)
        view = y[:, 1]
        view -= x[:, 0]
        y.view(-1)[0] = 5
        functional.leaky_relu(y, inplace=True)
        out = torch.empty_like(y)
        torch.add(y.detach(), 1, out=out)
        x.add_(1)
        return y, out


class Arguments(Base):
    def forward(self, x: Tensor, *rest: Tensor, scale: float = 2.0, **options: Any) -> Tensor:
        return self.lin(x) * scale + sum(rest) + options.get("bias", 0) + len(options)


case()(Arguments)
case(
    lambda batch, length: _noise(batch, length, 8),
    lambda batch, length: _noise(batch, 1, 8),
    bias=lambda batch, length: _noise(8),
)(Arguments)


@dataclasses.dataclass
class Output:
    hidden: Tensor
    count: int = 0
    extra: tuple[Any, ...] = ()


@case()
class MakesObject(Base):
    def forward(self, x: Tensor) -> Output:
        return Output(self.lin(x), x.shape[1], (x, None))


class Child(nn.Module):
    def forward(self, x: Tensor) -> Output:
        return Output(x * 2, x.shape[0], (x + 1, None))


@case()
class TakesObject(Base):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child()

    def forward(self, x: Tensor) -> Tensor:
        made = self.child(x)
        known = made.extra[1] is None
        return made.hidden + made.extra[0] + made.count if known else made.hidden


@case(variants=2)  # ``int(size)`` is a guard
class Contents(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count = (x.abs().sum() * 0 + 3).item()
        half = int(x.shape[1] // 2)
        return self.lin(x) * count, x.split([half, x.shape[1] - half], 1)[0]


@case(second=(3, 5))
class Splits(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        left, right = x[:, :4].chunk(2, 1)
        wide = self.lin(x).reshape(x.shape[0], -1, 1, 8).expand(-1, -1, 3, -1)
        query, key, value = wide.unbind(2)
        rows = [row * index for index, row in enumerate(x.unbind(1))]
        return torch.cat(rows, 1), left * right, query + key + value


@case()
class Scripted(Base):
    def forward(self, x: Tensor) -> Tensor:
        return _scripted()(self.lin(x), 2.0)


def _script_body(x: Tensor, y: float) -> Tensor:
    return x * y + torch.relu(x)


@functools.cache
def _scripted() -> Any:
    return torch.jit.script(_script_body)


@case(train=True)
class Checkpointed(Base):
    def forward(self, x: Tensor) -> Tensor:
        first = checkpoint(self.lin, x, use_reentrant=False)
        second = checkpoint(
            lambda y: functional.dropout(self.other(y), 0.3) * 2, x, use_reentrant=False
        )
        return first + second


@case(train=True)
class Reentrant(Base):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.other, self.lin(x), use_reentrant=True)


@case(variants=2)  # the first call leaves a table behind, and the second asks for its size
class Caches(Base):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(_noise(8))
        self.kept: dict[str, Tensor] = {}
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias * 2
        if self.table is None or self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1]).float()
        return self.lin(x) + self.kept["bias"] + self.table[:, None]


class Dropouts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(8)
        self.p = 0.2

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dropout(self.lin(x)).flatten(0, 1)).view_as(x)
        head = x[:, None]
        p = self.p if self.training else 0.0
        attended = functional.scaled_dot_product_attention(head, head, head, dropout_p=p)
        return functional.dropout(y, self.p, training=self.training) + attended[:, 0]


case(train=True)(Dropouts)
case(train=True, inline=("dropout", "norm"))(Dropouts)
case(inline=("norm",))(Dropouts)


@case(lambda batch, length: [_noise(batch, 1, 8), {"m": _noise(length, 8)}])
class Nested(Base):
    def forward(self, x: Tensor, pair: list[Any]) -> dict[str, Any]:
        bias, named = pair
        return {"a": [self.lin(x) + named["m"] + bias, None]}


@case(lambda batch, length: [_noise(batch, 1, 8), {"m": _noise(length, 8)}])
class WritesToArguments(Base):
    def forward(self, x: Tensor, pair: list[Any]) -> Tensor:
        pair[0] = self.lin(pair[0])
        pair[1]["m"] = pair[0] + x
        return pair[1]["m"] * 2


@case(lambda batch, length: length)
class TakesInt(Base):
    def forward(self, x: Tensor, count: int) -> Tensor:
        return self.lin(x) * count + torch.ones(count).sum()


@case()
class Sizes(Base):
    def forward(self, x: Tensor) -> list[Tensor]:
        batch, length = x.size(0), x.size(1)
        rounded = round(length / 2) + math.ceil(length / 3) + math.floor(length / 2)
        bounds = max(length, batch) + min(2, length) + abs(-length) + divmod(length, 2)[0]
        return [
            self.lin(x).view(batch * length, -1)[: length - 1],
            torch.ones(rounded + bounds + length % 2),
            functional.pad(x, (0, 0, 0, length)),
            functional.interpolate(x, scale_factor=2),
            functional.interpolate(x, size=length + 3),
            functional.adaptive_avg_pool1d(x, length // 2),
            x.repeat(1, length, 1),
            x.roll(length // 2, 1),
            torch.broadcast_to(x[0], (batch, length, 8)),
            functional.one_hot(torch.arange(length), length),
            x.flatten(1).unflatten(-1, (length, -1)) * x.numel(),
        ]


@case()
class Containers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.stem = nn.Sequential(self.lin, nn.GELU())
        self.named = nn.ModuleDict({"not-a-name": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = x + block(x) * index
        return self.named["not-a-name"](self.stem(x))


@case()
class PlainBool(Base):
    def forward(self, x: Tensor) -> Tensor:
        head = self.lin(x)[:, None]
        return functional.scaled_dot_product_attention(head, head, head, is_causal=x.shape[1] > 1)


@case()
class WritesToSelf(Base):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.mean()
        self.count = self.count + 1
        self.steps += 1
        return self.lin(x) * self.last


@case()
class SeveralResults(Base):
    def forward(self, x: Tensor) -> list[Tensor]:
        top = torch.topk(x.norm(dim=-1), 3, dim=1)
        picked = torch.gather(x, 1, top.indices[..., None].expand(-1, -1, 8))
        values, order = self.lin(x).sort(1)
        lowest = torch.finfo(x.dtype).min * x
        kept = x.masked_fill(x < 0, float("-inf"))
        return [picked + x.max(dim=1).values[:, None], values, order, lowest, kept, x[x > 0], x.mT]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind.__name__}{case.inline}")
def test_captured_forward_is_the_forward(case: Case) -> None:
    stock = case.kind().train(case.train)
    module = copy.deepcopy(stock)
    args, kwargs = copy.deepcopy(case.calls[0])
    forward = Forward(capture(module, args, kwargs, inline=case.inline))
    assert _state(module) == _state(stock)
    for call in case.calls:
        expected, received = (
            _call(run, call) for run in (stock, functools.partial(forward, module))
        )
        assert_same(received, expected)
        assert _state(module) == _state(stock)
        assert_same(list(module.buffers()) or call, list(stock.buffers()) or call)
    assert len(forward.variants) == case.variants


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind.__name__}{case.inline}")
def test_gradients_are_the_same(case: Case) -> None:
    stock = case.kind().train(case.train)
    module = copy.deepcopy(stock)
    args, kwargs = copy.deepcopy(case.calls[0])
    forward = Forward(capture(module, args, kwargs, inline=case.inline))
    for run in (stock, functools.partial(forward, module)):
        results = [x for x in tensors_in(_call(run, case.calls[0])[0]) if x.requires_grad]
        if results:
            sum((result.float().sum() for result in results), torch.zeros(())).backward()
    for mine, theirs in zip(module.parameters(), stock.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


def _call(run: Callable[..., Any], call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The result of a call and what the call did to its arguments."""
    args, kwargs = copy.deepcopy(call)
    torch.manual_seed(1)
    return run(*args, **kwargs), args, kwargs


def _state(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module that a call may change."""
    held = module.__dict__.items()
    return {name: value for name, value in held if isinstance(value, (int, float, str))}


def test_what_a_child_wrote_to_its_argument_cannot_be_read() -> None:
    class Writes(nn.Module):
        def forward(self, xs: list[Tensor]) -> Tensor:
            xs[0] = xs[0] + 1
            return xs[0]

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = Writes()

        def forward(self, xs: list[Tensor]) -> Tensor:
            return self.child(xs) + xs[0]

    with pytest.raises(CaptureError, match="child wrote to a list or dict"):
        capture(Parent(), ([torch.ones(2)],))


def test_a_list_made_for_a_child_to_write_to() -> None:
    class Appends(nn.Module):
        def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
            seen.append(x * 2)
            return torch.cat(seen)

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = Appends()

        def forward(self, x: Tensor) -> Tensor:
            return self.child(x, [x])

    module, x = Parent(), torch.ones(2)
    assert torch.equal(capture(module, (x,)).forward(module, x), module(x))
    seen, also = [x], [x]
    captured = capture(module.child, (x, [x]))
    assert torch.equal(captured.forward(module.child, x, seen), module.child(x, also))
    assert [item.tolist() for item in seen] == [item.tolist() for item in also]


def test_a_size_as_an_argument() -> None:
    class Table(nn.Module):
        def forward(self, shape: torch.Size) -> Tensor:
            return torch.arange(shape[1]).expand(shape[0], -1)

    module = Table()
    captured = capture(module, (torch.ones(2, 3).shape,))
    assert torch.equal(captured.forward(module, torch.Size((4, 5))), module(torch.Size((4, 5))))
