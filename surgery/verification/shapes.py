"""The same call at another batch size and length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from surgery.sources import Example


def others(example: Example) -> Iterator[tuple[str, Example]]:
    """Calls like ``example`` of other sizes, the most different first, each with a description.

    The batch is the first dimension of the first tensor, and grows by one row. The length is the
    second dimension of a two-dimensional integer tensor, such as token ids, and shrinks by one.
    A model may accept only some of them.
    """
    tensors = _tensors(example)
    batch = next((tensor.shape[0] for tensor in tensors if tensor.dim() > 0), None)
    length = next((tensor.shape[1] for tensor in tensors if _is_sequence(tensor)), None)
    if batch is not None and length is not None and length > 1:
        yield (
            f"batch {batch + 1}, length {length - 1}",
            example.map(lambda t: _grow(_cut(t, length), batch)),
        )
    if batch is not None:
        yield f"batch {batch + 1}", example.map(lambda t: _grow(t, batch))
    if length is not None and length > 1:
        yield f"length {length - 1}", example.map(lambda t: _cut(t, length))


def _tensors(example: Example) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Any:
        found.append(tensor)
        return tensor

    example.map(note)
    return found


def _is_sequence(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not (tensor.is_floating_point() or tensor.is_complex())


def _grow(tensor: Tensor, batch: int) -> Tensor:
    if tensor.dim() == 0 or tensor.shape[0] != batch:
        return tensor
    return torch.cat([tensor, tensor[:1].flip(-1) if tensor.dim() > 1 else tensor[:1]])


def _cut(tensor: Tensor, length: int) -> Tensor:
    return tensor[:, :-1] if _is_sequence(tensor) and tensor.shape[1] == length else tensor
