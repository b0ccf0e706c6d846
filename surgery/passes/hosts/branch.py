"""What hosts that add a low-rank branch to a layer's output have in common."""

from __future__ import annotations

import torch
from torch import Tensor


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on where ``x`` lives; the meta device knows none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def in_dtype_of(x: Tensor, A: Tensor) -> Tensor:
    """``x`` in the dtype of ``A``, unless autocast sees to it."""
    return x if autocasting(x) else x.to(A.dtype)


def add_branch(output: Tensor, branch: Tensor, factor: float) -> Tensor:
    """``output + factor · branch``, added in the wider dtype, in the dtype of ``output``."""
    return torch.add(output, branch, alpha=factor).to(output.dtype)


def add_scaled_branch(
    output: Tensor, branch: Tensor, factor: float, *, share: float, gain: Tensor, bare: Tensor
) -> Tensor:
    """``output + share · (gain ⊙ (bare + factor · branch) - bare)``, in the dtype of ``output``.

    Args:
        output: What the layer gives without this adapter.
        branch: ``B A x``.
        factor: Scaling of the branch.
        share: The adapter's share in the mix.
        gain: One factor per output feature, shaped to broadcast against ``output``.
        bare: What the layer gives without any adapter and without its bias.
    """
    changed = gain * torch.add(bare, branch, alpha=factor)
    return torch.add(output, changed - bare, alpha=share).to(output.dtype)
