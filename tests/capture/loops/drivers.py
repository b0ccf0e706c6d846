"""Drivers in every form that model code takes. Each runs its four blocks in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

WIDTH = 4


class Block(nn.Module):
    """x, shift -> tanh(W x) + shift."""

    kind = "full"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return torch.tanh(self.linear(x)) + shift


class Driver(nn.Module):
    """Holds four blocks; the classes below differ in how they run them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.other = nn.ModuleList(nn.Identity() for _ in range(4))
        self.count = 4


class Plain(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Enumerated(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers[: self.count]):
            x = layer(x, shift=float(i))
        return x


class Zipped(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for i, (layer, (other, scale)) in enumerate(
            zip(self.layers, zip(self.other, range(4), strict=True), strict=True)
        ):
            x = other(layer(x, i)) * (1 + scale)
        return x


class Indexed(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.layers)):
            layer = self.layers[i]
            x = layer(x)
        return x


class Subscripted(Driver):
    def forward(self, x: Tensor) -> Tensor:
        i = 0
        while i < len(self.layers):
            x = self.layers[i](x)
            i += 1
        return x


class TwoParts(Driver):
    """The history must go on from one loop to the next."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = layer(x)
        x = x * 2
        for layer in self.layers[2:]:
            x = layer(x)
        return x


class FirstApart(Driver):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer, other in zip(self.layers[1:], self.other, strict=False):
            x = other(layer(x))
        return x


class Branches(Driver):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            for layer in self.layers:
                x = layer(x, 1.0)
        elif self.training:
            for layer in self.layers:
                x = layer(x) * 0.5
        else:
            for layer in list(self.layers):
                if isinstance(layer, nn.Identity) or layer.kind == "none":
                    continue
                with torch.no_grad():
                    x = layer(x)
                if x.isnan().any():
                    break
        return x


class Early(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 3:
                return x
        return x


class Walrus(Driver):
    def forward(self, x: Tensor) -> Tensor:
        layers = iter(self.layers)
        while (layer := next(layers, None)) is not None:
            x = layer(x)
        return x


class Comprehension(Driver):
    def forward(self, x: Tensor) -> Tensor:
        x = [x := layer(x) for layer in self.layers][-1]
        return x


class Conditional(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            layer = self.layers[i] if i < self.count else self.other[i]
            x = (layer if self.count else self.other[0])(x)
        return x


class Reduced(Driver):
    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda state, layer: layer(state), self.layers, x)


class Nested(Driver):
    """A function of the method runs the block."""

    def forward(self, x: Tensor) -> Tensor:
        def run(layer: nn.Module, state: Tensor) -> Tensor:
            return layer(state)

        for layer in self.layers:
            x = run(layer, x)
        return x


class Helper(Driver):
    """Blocks come from a method and a property."""

    def chosen(self) -> nn.ModuleList:
        return self.layers

    @property
    def rest(self) -> list[nn.Module]:
        return list(self.layers)[2:]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.chosen()[:2]:
            x = layer(x)
        for layer in self.rest:
            x = layer(x)
        return x


class Collected(Driver):
    def forward(self, x: Tensor) -> Tensor:
        todo = []
        for layer in self.layers:
            todo.append(layer)  # noqa: PERF402 (the form is the point)
        for layer in todo:
            x = layer(x)
        return x


class Alias(Driver):
    """The last block has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.final = self.layers[-1]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x)
        return self.final(x)


class Forwards(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward(x) if self.count > 9 else layer.__call__(x)
        return x


class Checkpointed(Driver):
    """Each way of handing a block to a checkpointing function."""

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        def around(module: nn.Module) -> Callable[..., Any]:
            def custom_forward(*inputs: Any) -> Any:
                return module(*inputs, 0.5)

            return custom_forward

        first, second, third, fourth = self.layers
        x = checkpoint(first, x, use_reentrant=False)
        x = torch.utils.checkpoint.checkpoint(
            second.__call__,
            x,
            0.25,
            use_reentrant=False,
        )
        x = checkpoint(functools.partial(third, shift=0.125), x, use_reentrant=False)
        return checkpoint(around(fourth), x, use_reentrant=False)


class CheckpointedLambda(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda state, block=layer: block(state, 0.5), x, use_reentrant=False)
        return x


class Instance(Driver):
    """The checkpointing function is an attribute that is set later."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpointing = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.checkpointing(layer, x) if self.training else layer(x)
        return x


class Sequence(Driver):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.layers, 4, x, use_reentrant=False)


class Private(Driver):
    def __scaled(self, x: Tensor) -> Tensor:
        return x * 3

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.__scaled(layer(x))
        return x


class Base(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = layer(x)
        return x


class Derived(Base):
    """Runs half of the blocks in its ancestor's forward, through ``super()``."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x) + 1
        for layer in self.layers[2:]:
            x = layer(x)
        return x


class DerivedTwice(Derived):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def doubling(factor: float) -> Callable[..., Any]:
    """A decorator with state in a cell and an unwrapped helper."""

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        @functools.wraps(function)
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            self.calls = calls
            return function(self, *args, **kwargs) * factor

        return wrapper

    return decorator


def bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that does not say what it wraps."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


class Decorated(Driver):
    @doubling(2.0)
    @bare
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Straight(nn.Module):
    """Blocks under names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2, self.block3, self.block4 = (Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(x)
        x = self.block2(x, shift=x.mean())
        for i in range(3, 5):
            x = getattr(self, f"block{i}")(x)
        return x


class Stages(nn.Module):
    """A list of lists, run by one loop in another."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage["blocks"]:
                x = block(x)
        return x


class Yielding(Driver):
    """Hands its blocks out; nothing here runs one."""

    def each(self) -> Iterator[nn.Module]:
        yield from self.layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.each():
            x = layer(x)
        return x


class Matched(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            match (i, self.layers[i]):
                case (_, Block() as layer):
                    x = layer(x)
        return x


class NonLocal(Driver):
    def forward(self, x: Tensor) -> Tensor:
        current: nn.Module = self

        def pick(i: int) -> None:
            nonlocal current
            current = self.layers[i]

        for i in range(4):
            pick(i)
            x = current(x)
        return x


class Giver(Driver):
    def some(self) -> nn.ModuleList:
        return self.layers


class Taker(Giver):
    """Its blocks come from an ancestor's method that it hides."""

    def some(self) -> nn.ModuleList:
        return self.other

    def forward(self, x: Tensor) -> Tensor:
        for layer in super().some():
            x = layer(x)
        return x


class Static(Driver):
    """A class attribute that holds the checkpointing function."""

    recompute = staticmethod(checkpoint)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.recompute(layer, x, use_reentrant=False)
        return x


FORMS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        Plain,
        Enumerated,
        Zipped,
        Indexed,
        Subscripted,
        TwoParts,
        FirstApart,
        Branches,
        Early,
        Walrus,
        Comprehension,
        Conditional,
        Reduced,
        Nested,
        Helper,
        Collected,
        Alias,
        Forwards,
        Checkpointed,
        CheckpointedLambda,
        Instance,
        Sequence,
        Private,
        Base,
        Derived,
        DerivedTwice,
        Decorated,
        Straight,
        Stages,
        Yielding,
        Matched,
        NonLocal,
        Taker,
        Static,
    )
}


# Not to be rewritten ------------------------------------------------------------------------------


class Keyword(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(function=layer, x=x, use_reentrant=False)
        return x


class Parts(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.linear(x)
        return x


class Kept(Driver):
    """Stores the block in another object, which may run it later."""

    def forward(self, x: Tensor, log: Any) -> Tensor:
        for layer in self.layers:
            log.current = layer
            x = layer(x)
        return x


class Unknown(Driver):
    def forward(self, x: Tensor, runner: Any) -> Tensor:
        for layer in self.layers:
            x = runner.run(x, layer)
        return x


class Handed(Driver):
    """A function around a block that does more than run it."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:

            def custom(state: Tensor, block: nn.Module = layer) -> Tensor:
                return block(state * 2)

            x = checkpoint(custom, x, use_reentrant=False)
        return x


class Caching:
    """A decorator that is a class."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__wrapped__ = function

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        return functools.partial(self.__wrapped__, instance)


class ByClass(Driver):
    @Caching
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Replaced(Driver):
    def forward(self, x: Tensor) -> Tensor:
        self.layers = nn.ModuleList([*self.layers])
        for layer in self.layers:
            x = layer(x)
        return x


class StaticHelper(Driver):
    @staticmethod
    def run(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x * 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.run(layer, x)
        return x


class OwnHelper(Driver):
    def run(self, x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.run(x, layer=layer)
        return x


class Whole(Driver):
    """Calls a slice of its blocks as if it were a module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*self.layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2:](self.layers[:2](x))


class Text(Driver):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            self.shown = f"{layer(x)}"
        return x


REFUSED: dict[type[nn.Module], str] = {
    Keyword: "checkpoint",
    Parts: "a part of a block is run by itself",
    Kept: "a block is stored in another object",
    Unknown: "a block is given to runner.run",
    Handed: "a function that runs a block in a way of its own",
    ByClass: "it is wrapped by a Caching",
    Replaced: "the stack is replaced",
    StaticHelper: "StaticHelper.run is given a block and runs it",
    OwnHelper: "OwnHelper.run is given a block and runs it",
    Whole: "a part of the stack is called as a module",
    Text: "a block is run inside a string",
}


class Quiet(Driver):
    """Methods that look at blocks and run none."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.linear(torch.zeros(WIDTH))

    def reset(self) -> None:
        for i, layer in enumerate(self.layers):
            nn.init.constant_(layer.linear.weight, float(i))
            self.apply(lambda module: module.train())

    def kinds(self) -> list[Any]:
        return [layer.kind for layer in self.layers]

    def last(self) -> nn.Module:
        return self.layers[-1]

    def replace(self, layer: nn.Module) -> None:
        self.layers[0] = layer
        self.layers.append(layer)
        self.first = self.layers[0]

    def weights(self) -> int:
        return sum(p.numel() for layer in self.layers for p in layer.parameters())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
