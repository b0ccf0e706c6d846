"""BlockIAF: the authors' inverse mirror map, an inverse autoregressive flow over blocks.

arXiv 2312.13486 (ICASSP 2024), repository zhangyilang/MetaMirrorDescent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from architectures.mirror.base import MirrorMap, Shape, draw_uniform, modes_of
from architectures.mirror.kronecker import Decoder, Encoder


@dataclass(frozen=True)
class BlockOptions:
    """Options of ``BlockIAF``.

    Attributes:
        blocks: How many tensors make a block; ``module`` for those of one module each.
        shrink: What every dimension of a tensor is divided by, rounding down but not below 1,
            from layer to layer of the encoders, and multiplied by in the decoders.
    """

    blocks: int | Literal["module"] = 4
    shrink: tuple[int, ...] = (2, 2, 2)


class BlockIAF(MirrorMap):
    """``phi_j = z_j ⊙ exp(s_j) + t_j`` per block of tensors, s and t made of the blocks before it.

    The tensors, in order, are cut into blocks. The numbers of the first block have a scale and a
    shift of their own each. Those of a later block are decoded from an embedding, which a linear
    layer makes of the embeddings of all earlier blocks::

        e_i = encode(z_i)            per tensor, every block but the last
        h_j = A_j [e of blocks < j]  the autoregressor
        s_j, t_j = decode(h_j)       per tensor of block j

    The Jacobian is block lower triangular with a positive diagonal, so the map is invertible; it
    is not symmetric, hence not the gradient of a potential (see ``Legendre``).

    Every encoder ends with a ReLU, and every decoder begins with one. Where the embedding is a
    single number, as of small tensors, it is often off: its encoder gets no gradient until a
    tensor moves it above zero.

    Attributes:
        first: Log-scale and shift of every tensor of the first block.
        encoders: One for each tensor but those of the last block.
        autoregressors: One ``nn.Linear`` for each block but the first.
        decoders: One for each tensor but those of the first block.
    """

    Options: ClassVar[type] = BlockOptions
    couples: ClassVar[bool] = True

    def _build(self, made_with: dict[str, Any]) -> None:
        self.blocks = tuple(self._cut())
        sizes = [shrunk(modes_of(shape), self.options.shrink) for shape in self.shapes]
        widths = [math.prod(each[-1]) for each in sizes]
        first, last = self.blocks[0], self.blocks[-1]
        self.first = nn.ModuleList(Elementwise(self.shapes[index], made_with) for index in first)
        self.encoders = nn.ModuleList(
            Encoder(sizes[index], made_with) for index in range(last.start)
        )
        self.autoregressors = nn.ModuleList(
            nn.Linear(sum(widths[: block.start]), sum(widths[i] for i in block), **made_with)
            for block in self.blocks[1:]
        )
        self.decoders = nn.ModuleList(
            Decoder(sizes[index][::-1], made_with) for index in range(first.stop, last.stop)
        )
        # Where the part of each tensor is in what the autoregressor of its block gives.
        ends = [list(itertools.accumulate(widths[i] for i in block)) for block in self.blocks]
        self._spans = tuple(pair for each in ends for pair in itertools.pairwise([0, *each]))

    def _cut(self) -> Iterator[range]:
        """The blocks, as ranges of indices of tensors."""
        self._check_shrink()
        size, count = self.options.blocks, len(self.shapes)
        if size == "module":
            for _, members in itertools.groupby(range(count), lambda index: self.owners[index]):
                together = list(members)
                yield range(together[0], together[-1] + 1)
            return
        if size < 1:
            raise ValueError(f"a block has 1 tensor or more, got blocks={size!r}")
        for start in range(0, count, size):
            yield range(start, min(start + size, count))

    def _check_shrink(self) -> None:
        if not self.options.shrink or any(each < 1 for each in self.options.shrink):
            raise ValueError(f"shrink has factors of 1 or more, got {self.options.shrink!r}")

    def start(self, generator: torch.Generator | None) -> None:
        """Zero what scales and shifts, as the authors do; draw everything else, in our own way."""
        if any(parameter.is_meta for parameter in self.parameters()):
            return
        for each in cast("Sequence[Elementwise]", self.first):
            each.clear()
        for encoder in cast("Sequence[Encoder]", self.encoders):
            encoder.draw(generator)
        for linear in cast("Sequence[nn.Linear]", self.autoregressors):
            for parameter in linear.parameters():
                draw_uniform(parameter, 1 / math.sqrt(linear.in_features), generator)
        for decoder in cast("Sequence[Decoder]", self.decoders):
            decoder.draw(generator)

    def forward(self, *dual: Tensor) -> tuple[Tensor, ...]:
        """``T(z)``: the primal tensors, each in the shape of its dual."""
        primal: list[Tensor] = []
        embeddings: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            hidden = self._hidden(number, embeddings)
            for index in block:
                log_scale, shift = self._scale(index, hidden)
                primal.append(dual[index] * log_scale.exp() + shift)
            embeddings += self._embedded(number, dual)
        return tuple(primal)

    def dual(self, *primal: Tensor) -> tuple[Tensor, ...]:
        """The inverse in closed form, block by block: what it takes of earlier ones is known."""
        dual: list[Tensor] = []
        embeddings: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            hidden = self._hidden(number, embeddings)
            for index in block:
                log_scale, shift = self._scale(index, hidden)
                dual.append((primal[index] - shift) * (-log_scale).exp())
            embeddings += self._embedded(number, dual)
        return tuple(dual)

    def one(self, index: int, *dual: Tensor) -> Tensor:
        """One primal tensor: the encoders of the blocks before its own, and its own decoder."""
        embeddings: list[Tensor] = []
        number = 0
        while index not in self.blocks[number]:
            embeddings += self._embedded(number, dual)
            number += 1
        log_scale, shift = self._scale(index, self._hidden(number, embeddings))
        return dual[index] * log_scale.exp() + shift

    def _hidden(self, number: int, embeddings: list[Tensor]) -> Tensor | None:
        """What the autoregressor makes of the embeddings before a block; the first has none."""
        return self.autoregressors[number - 1](torch.cat(embeddings)) if number else None

    def _scale(self, index: int, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of a tensor."""
        if hidden is None:
            own = cast("Elementwise", self.first[index])
            return own.log_scale, own.shift
        # Not split: its several outputs are more than checkpointing under the compiler takes.
        start, stop = self._spans[index]
        log_scale, shift = self.decoders[index - len(self.blocks[0])](hidden[start:stop])
        shape = self.shapes[index]
        return log_scale.reshape(shape), shift.reshape(shape)

    def _embedded(self, number: int, dual: Sequence[Tensor]) -> list[Tensor]:
        """The embeddings of the tensors of a block; none of the last one, which nothing reads."""
        if number == len(self.blocks) - 1:
            return []
        return [
            self.encoders[index](dual[index].reshape(modes_of(self.shapes[index])))
            for index in self.blocks[number]
        ]


class Elementwise(nn.Module):
    """A scale and a shift for every number of a tensor."""

    def __init__(self, shape: Shape, made_with: dict[str, Any]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.empty(shape, **made_with))
        self.shift = nn.Parameter(torch.empty(shape, **made_with))

    @torch.no_grad()
    def clear(self) -> None:
        """Scale 1, shift 0."""
        self.log_scale.zero_()
        self.shift.zero_()


def shrunk(shape: Shape, factors: Sequence[int]) -> list[Shape]:
    """A shape, then what is left of it after each division."""
    sizes = [shape]
    for factor in factors:
        sizes.append(tuple(max(size // factor, 1) for size in sizes[-1]))
    return sizes
