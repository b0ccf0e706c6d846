"""Put a value where a model holds a tensor; the object stays the same where it can."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.checkpoints.inventory import Place


def fill(
    place: Place, tensor: Tensor, used: set[int], device: str | torch.device | None = None
) -> None:
    """Give the tensor at a place its saved value.

    Args:
        place: The place.
        tensor: The value, on any device.
        used: Ids of tensors that have their values: another object is put beside those.
        device: Where a tensor that was on the meta device is put; the CPU by default.
    """
    present = place.tensor
    if present.device.type == "meta":
        place.put(like(present, tensor.to(device or "cpu")))
    elif id(present) in used:
        place.put(like(present, tensor.to(present.device)))
    elif present.dtype == tensor.dtype and present.stride() == tensor.stride():
        present.data.copy_(tensor)
    else:
        present.data = tensor.to(present.device)


def like(present: Tensor, tensor: Tensor) -> Tensor:
    """A value as what is at a place now: a parameter with its flag, or a buffer."""
    if isinstance(present, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=present.requires_grad)
    return tensor


def tie(alias: Place, stored: Place) -> None:
    """Let two places hold one tensor."""
    if alias.tensor is stored.tensor:
        return
    if alias.is_parameter == stored.is_parameter:
        alias.put(stored.tensor)
    else:
        alias.put(like(alias.tensor, stored.tensor.detach()))
