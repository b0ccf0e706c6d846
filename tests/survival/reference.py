"""The formula of the shortcuts, written a second time: hooks and hand-written residual additions.

Nothing of what the library runs is used here. The coefficients are read by their names, turned
into a matrix by ``weights``, and mixed into the stock model one product at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.survival.models import NAMED, Stack, Stream, Subject

TEMPERATURE = 0.01
MARK = ".shortcuts."


@dataclass(frozen=True)
class Column:
    """One rewrite of the table: the options of the ``shortcuts`` pass."""

    name: str
    topology: str = "ancre"
    scope: str = "block"
    mode: str = "add"
    init: str = "uniform"


MAIN = Column("ancre")
OTHERS = (
    Column("residual, add", scope="residual", init="identity"),
    Column("residual, replace", scope="residual", mode="replace", init="identity"),
    Column("block, replace", mode="replace"),
    Column("denseformer", topology="denseformer", init="identity"),
)
COLUMNS = {column.name: column for column in (MAIN, *OTHERS)}


def coefficients(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every trained coefficient of a rewritten model, by its name."""
    return {name: p for name, p in model.named_parameters() if MARK in name}


def randomise(model: nn.Module, *, seed: int = 3) -> None:
    """Draw every coefficient: at the temperature's scale, so that no softmax is one-hot."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in coefficients(model).items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=TEMPERATURE if name.endswith("logits") else 0.3)


class Mixture:
    """The history of one stack: ``enter`` notes a state, ``leave`` adds the mixture of all.

    Args:
        weights: Computes the matrix: K rows, of K or, for ``denseformer``, K + 1 columns.
        averages: Whether it is DenseFormer's, an average over x_0 and what the blocks gave.
    """

    def __init__(self, weights: Callable[[], Tensor], *, averages: bool = False) -> None:
        self.weights = weights
        self.averages = averages
        self.states: list[list[Tensor]] = []
        self.given: list[list[Tensor]] = []
        self.W = torch.empty(0)

    def enter(self, site: int, states: tuple[Tensor, ...]) -> None:
        """Note the states that go into site ``site``; the first begins a history."""
        if site == 0:
            self.states = [[] for _ in states]
            self.given = [[state] for state in states]
            self.W = self.weights()
        for history, state in zip(self.states, states, strict=True):
            assert len(history) == site, f"site {site} was entered after {len(history)} states"
            history.append(state)

    def leave(self, site: int, stream: int, y: Tensor) -> Tensor:
        """x_{k+1} = y_k + Σ_j W_kj x_j, or DenseFormer's Σ_j α_kj X_j."""
        if self.averages:
            self.given[stream].append(y)
            return sum(
                (a * X for a, X in zip(self.W[site], self.given[stream], strict=False)), 0 * y
            )
        for j, state in enumerate(self.states[stream]):
            y = y + self.W[site, j] * state
        return y


class Reference:
    """A stock model that computes the formula of a column with coefficients of its own.

    Attributes:
        model: The stock model, with hooks or with blocks written anew.
        coefficients: Leaves by their names in the rewritten model; their gradients compare.
        mixtures: The history of each stack, as the last call left it.
    """

    def __init__(
        self, subject: Subject, column: Column | None, given: dict[str, Tensor], model: nn.Module
    ) -> None:
        self.model = model
        self.coefficients = {
            name: nn.Parameter(tensor.detach().clone()) for name, tensor in given.items()
        }
        self.mixtures: list[Mixture] = []
        if column is None:
            return
        stacks = subject.stacks if column.scope == "block" else RESIDUAL[subject.name].stacks
        self.check_names(stacks)
        for stack in stacks:
            count = len(stack.sites)
            averages = column.topology == "denseformer"
            mixture = Mixture(self.matrix(column, stack), averages=averages)
            self.mixtures.append(mixture)
            if column.scope == "block":
                for site, path in enumerate(stack.sites):
                    hook_block(model.get_submodule(path), stack.streams, mixture, site)
                continue
            by_hand = RESIDUAL[subject.name]
            for site in range(0, count, by_hand.additions):
                block = model.get_submodule(stack.sites[site])
                by_hand.rewrite(block, Addition(mixture, site, column.mode))

    def check_names(self, stacks: tuple[Stack, ...]) -> None:
        """Raise unless every stack has coefficients, and there are no others."""
        strays = [
            name
            for name in self.coefficients
            if not any(name.startswith(stack.prefix) for stack in stacks)
        ]
        missing = [
            stack.prefix
            for stack in stacks
            if not any(name.startswith(stack.prefix) for name in self.coefficients)
        ]
        assert not strays, f"coefficients in no expected stack: {strays}"
        assert not missing, f"stacks without coefficients: {missing}"

    def matrix(self, column: Column, stack: Stack) -> Callable[[], Tensor]:
        """What computes W of one stack from its coefficients."""
        mine = {
            name.removeprefix(stack.prefix): tensor
            for name, tensor in self.coefficients.items()
            if name.startswith(stack.prefix)
        }
        return lambda: weights(column, mine, len(stack.sites))


def weights(column: Column, given: dict[str, Tensor], sites: int) -> Tensor:
    """The matrix of one stack from its one vector of coefficients, row after row."""
    (vector,) = given.values()
    averages = column.topology == "denseformer"
    lengths = [site + (2 if averages else 1) for site in range(sites)]
    assert len(vector) == sum(lengths), f"{len(vector)} coefficients for {sites} sites"
    rows = [row if averages else _softmax(row, column) for row in vector.split(lengths)]
    full = [F.pad(row, (0, lengths[-1] - len(row))) for row in rows]
    return torch.stack(full) + _diagonal(column) * torch.eye(sites, lengths[-1])


def _softmax(logits: Tensor, column: Column) -> Tensor:
    """The authors' softmax; for identity, what it differs from the one of equal logits."""
    made = (logits / TEMPERATURE).softmax(0)
    return made - 1 / len(logits) if column.init == "identity" else made


def _diagonal(column: Column) -> int:
    """What ``replace`` adds: the shortcut at the start, less the one that a block has inside."""
    if column.mode == "add":
        return 0
    starts_as_shortcut = column.init == "identity"
    inside = column.scope == "block"
    return int(starts_as_shortcut) - int(inside)


def hook_block(block: nn.Module, streams: tuple[Stream, ...], mixture: Mixture, site: int) -> None:
    """Note what goes into a block and mix what comes out of it."""
    signature = inspect.signature(block.forward)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        mixture.enter(site, tuple(bound[stream.argument] for stream in streams))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        for number, stream in enumerate(streams):
            if stream.result is None:
                output = mixture.leave(site, number, output)
            elif output[stream.result] is not None:  # SD3's last block drops the text
                mixed = mixture.leave(site, number, output[stream.result])
                output = (*output[: stream.result], mixed, *output[stream.result + 1 :])
        return output

    block.register_forward_pre_hook(before, with_kwargs=True)
    block.register_forward_hook(after)


class Addition:
    """One residual addition of residual scope: state j is the shortcut of addition j.

    ``first`` is the number of a block's first addition in the history of its stack.
    """

    def __init__(self, mixture: Mixture, first: int, mode: str) -> None:
        self.mixture, self.first, self.mode = mixture, first, mode

    def __call__(self, shortcut: Tensor, branch: Tensor, number: int = 0) -> Tensor:
        site = self.first + number
        self.mixture.enter(site, (shortcut,))
        kept = branch if self.mode == "replace" else shortcut + branch
        return self.mixture.leave(site, 0, kept)


def _llama(layer: Any, add: Addition) -> None:
    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        h = hidden_states
        h = add(h, layer.self_attn(hidden_states=layer.input_layernorm(h), **kwargs)[0])
        return add(h, layer.mlp(layer.post_attention_layernorm(h)), 1)

    layer.forward = forward


def _bert(layer: Any, add: Addition) -> None:
    def normalised(part: Any, number: int) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
            branch = part.dropout(part.dense(hidden_states))
            return part.LayerNorm(add(input_tensor, branch, number))

        return forward

    layer.attention.output.forward = normalised(layer.attention.output, 0)
    layer.output.forward = normalised(layer.output, 1)


def _vit(block: Any, add: Addition) -> None:
    def forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attended = block.attn(block.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = add(x, block.drop_path1(block.ls1(attended)))
        return add(x, block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), 1)

    block.forward = forward


def _resnet(block: Any, add: Addition) -> None:
    def forward(x: Tensor) -> Tensor:
        shortcut = x if block.downsample is None else block.downsample(x)
        x = block.act1(block.bn1(block.conv1(x)))
        x = block.aa(block.act2(block.bn2(block.conv2(x))))
        x = block.bn3(block.conv3(x))
        if block.drop_path is not None:
            x = block.drop_path(x)
        return block.act3(add(shortcut, x))

    block.forward = forward


@dataclass(frozen=True)
class ByHand:
    """Residual scope of one model: its stacks, additions per block, and how to write a block anew.

    ``stacks`` lists one site for every addition, the path of its block.
    """

    stacks: tuple[Stack, ...]
    rewrite: Callable[[Any, Addition], None]
    additions: int = 1


def _additions(subject: str, count: int) -> tuple[Stack, ...]:
    return tuple(
        replace(stack, sites=tuple(path for path in stack.sites for _ in range(count)))
        for stack in NAMED[subject].stacks
    )


RESIDUAL = {
    "Llama": ByHand(_additions("Llama", 2), _llama, 2),
    "BERT": ByHand(_additions("BERT", 2), _bert, 2),
    "ViT": ByHand(_additions("ViT", 2), _vit, 2),
    "ResNet-50": ByHand(_additions("ResNet-50", 1), _resnet),
}
