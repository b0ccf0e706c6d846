"""Convolutions: A as a kernel of the same size with rank channels, then B at every position.

Grouped ones are convolved with the changed weight instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from architectures.adapters import Adapter
from surgery.passes.hosts.bank import Bank, bank_of
from surgery.passes.hosts.branch import add_branch, add_scaled_branch, in_dtype_of
from surgery.passes.hosts.weight import changed_weight

if TYPE_CHECKING:
    _Conv = nn.Conv2d
else:
    _Conv = object

_POINTWISE: dict[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}


class _ConvHost(_Conv):
    """A convolution with adapters, of any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """Maps x (batch, in, *positions) to (batch, out, *positions); the batch may be missing."""
        bank = bank_of(self)
        if bank is None:
            return _stock(self, input)
        counting = bank.counting()
        if is_cheaper_folded(self, counting):
            weight = changed_weight(bank, self.weight)
            return self._conv_forward(input, weight, self.bias)
        output = with_convolutions(self, bank, counting, input, _stock(self, input))
        return bank.seal(output, input)


class Conv1dHost(_ConvHost, nn.Conv1d):
    """An ``nn.Conv1d`` with adapters. Stands right above it among its class's ancestors."""


class Conv2dHost(_ConvHost, nn.Conv2d):
    """An ``nn.Conv2d`` with adapters. Stands right above it among its class's ancestors."""


class Conv3dHost(_ConvHost, nn.Conv3d):
    """An ``nn.Conv3d`` with adapters. Stands right above it among its class's ancestors."""


def _stock(layer: nn.Conv2d, x: Tensor) -> Tensor:
    # What super().forward is. Another thread may take the adapters, and with them the host's class,
    # away meanwhile, and super() would find that the layer is no instance of it any more.
    return layer._conv_forward(x, layer.weight, layer.bias)  # pyright: ignore[reportPrivateUsage]


def with_convolutions(
    layer: nn.Conv2d,
    bank: Bank,
    counting: list[tuple[Adapter, float]],
    x: Tensor,
    plain: Tensor,
) -> Tensor:
    """What a convolution gives with the branches of its adapters.

    Args:
        layer: The convolution.
        bank: Its adapters.
        counting: Those that count, each with its share.
        x: What it was called with, (batch, in, *positions) or without the batch.
        plain: What it gave for it, (batch, out, *positions).
    """
    output = plain
    for adapter, share in counting:
        branch = _branch(layer, adapter, x)
        if not adapter.scales_rows:
            output = add_branch(output, branch, share * adapter.scaling)
            continue
        output = add_scaled_branch(
            output,
            branch,
            adapter.scaling,
            share=share,
            gain=_per_channel(layer, adapter.gain(bank.matrix.fold(layer.weight))),
            bare=plain if layer.bias is None else plain - _per_channel(layer, layer.bias),
        )
    return output


def is_cheaper_folded(layer: nn.Conv2d, counting: list[tuple[Adapter, float]]) -> bool:
    """Whether to convolve with the changed weight.

    A branch of a grouped convolution has rank channels per group, many times the layer's own
    where it is depthwise, and the weight is small.
    """
    drops = layer.training and any(adapter.dropout for adapter, _ in counting)
    return layer.groups > 1 and not drops and type(layer.weight) in (nn.Parameter, Tensor)


def _branch(layer: nn.Conv2d, adapter: Adapter, x: Tensor) -> Tensor:
    """``B A x``. Each group sees its own inputs through A and leaves by its own rows of B."""
    A, B = adapter.factors()
    dimensions, groups = layer.weight.dim() - 2, layer.groups
    kernel = A.view(-1, *layer.weight.shape[1:])
    if groups > 1:
        kernel = kernel.repeat(groups, *[1] * (dimensions + 1))
    kept = functional.dropout(x, adapter.dropout, layer.training) if adapter.dropout else x
    # The layer's own method knows its stride, dilation and padding mode.
    codes = layer._conv_forward(in_dtype_of(kept, A), kernel, None)  # pyright: ignore[reportPrivateUsage]
    pointwise = B.view(*B.shape, *[1] * dimensions)
    return _POINTWISE[dimensions](codes, pointwise, groups=groups)


def _per_channel(layer: nn.Conv2d, vector: Tensor) -> Tensor:
    """``(out,)`` shaped to broadcast against the output, batched or not."""
    return vector.view(-1, *[1] * (layer.weight.dim() - 2))
