"""Layers whose output is linear in their input: nn.Linear, and others as black boxes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from architectures.adapters import Adapter
from surgery.passes.hosts.bank import Bank, bank_of
from surgery.passes.hosts.branch import add_branch, add_scaled_branch, autocasting, in_dtype_of
from surgery.passes.hosts.weight import below
from surgery.tree import own_parameters

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

_PLAIN = (nn.Parameter, Tensor)


class LinearHost(nn.Linear):
    """An ``nn.Linear`` with adapters. Stands right above ``nn.Linear`` among its ancestors."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        """Maps x (..., in) to (..., out)."""
        # By name: another thread may take the adapters, and with them this class, away meanwhile,
        # and super() would find that ``self`` is no instance of it any more.
        bank = bank_of(self)
        if bank is None:
            return nn.Linear.forward(self, input)
        counting = bank.counting()
        if len(counting) == 1 and _is_simple(counting[0][0], self, input):
            return bank.seal(_in_one_go(self, input, *counting[0]), input)
        if bank.trained and _kernel_changed(self, input):
            output = _as_if_trained(self, input)
        else:
            output = nn.Linear.forward(self, input)
        return bank.seal(with_branches(self, bank, counting, input, output), input)


class OutputHost(_Module):
    """A layer that computes ``W x + b`` in whatever way: weight quantised or transposed."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
        """Maps x (..., in) to (..., out)."""
        if torch.compiler.is_compiling():
            run = super().forward
        else:
            # Not by super(), as in LinearHost.
            run = partial(below(type(self), OutputHost, "forward"), self)
        output = cast("Tensor", run(input, *args, **kwargs))
        bank = bank_of(self)
        if bank is None:
            return output
        return bank.seal(with_branches(self, bank, bank.counting(), input, output), input)


def _is_simple(adapter: Adapter, layer: nn.Linear, x: Tensor) -> bool:
    """Whether one dtype is involved, and flattening x leaves every bit of the product as it is."""
    weight = layer.weight
    return (
        not adapter.scales_rows
        and (adapter.dropout == 0.0 or not layer.training)
        and type(weight) in _PLAIN
        and x.is_contiguous()
        and x.dtype == weight.dtype == adapter.factors()[0].dtype
        and not autocasting(x)
    )


def _in_one_go(layer: nn.Linear, x: Tensor, adapter: Adapter, share: float) -> Tensor:
    """``W x + b + share · scaling · B A x`` without a temporary of the output's size."""
    A, B = adapter.factors()
    factor = share * adapter.scaling
    if torch.compiler.is_compiling():
        # The compiler fuses the sum with what follows. Scaling the rank-sized codes saves a scaled
        # copy of the output's gradient.
        branch = functional.linear(functional.linear(x, A) * factor, B)
        return functional.linear(x, layer.weight, layer.bias) + branch
    flat = x.view(-1, x.shape[-1])
    output = functional.linear(flat, layer.weight, layer.bias)
    # The product is not saved for backward and has no other reference: adding in place is safe.
    output.addmm_(functional.linear(flat, A), B.t(), alpha=factor)
    return output.view(*x.shape[:-1], output.shape[-1])


def _kernel_changed(layer: nn.Linear, x: Tensor) -> bool:
    """Whether freezing the weight alone made ``functional.linear`` multiply in another way.

    For an input that cannot be flattened in place torch multiplies matrix by matrix, unless the
    weight requires a gradient (``should_fold`` in ATen's LinearAlgebra.cpp). The last bits differ.
    """
    weight = layer.weight
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and x.dim() > 2
        and not x.is_contiguous()
        and not autocasting(x)
    )


def _as_if_trained(layer: nn.Linear, x: Tensor) -> Tensor:
    """What ``functional.linear`` gives, bit for bit, where the weight requires a gradient."""
    flat = torch.mm(x.reshape(-1, x.shape[-1]), layer.weight.t())
    output = flat.view(*x.shape[:-1], flat.shape[-1])
    bias = cast("Tensor | None", layer.bias)
    return output if bias is None else output + bias


def with_branches(
    layer: nn.Module,
    bank: Bank,
    counting: list[tuple[Adapter, float]],
    x: Tensor,
    plain: Tensor,
) -> Tensor:
    """What a layer that computes ``W x + b`` gives with the branches of its adapters.

    Args:
        layer: The layer.
        bank: Its adapters.
        counting: Those that count, each with its share.
        x: What the layer was called with, (..., in).
        plain: What it gave for it, (..., out).
    """
    output = plain
    for adapter, share in counting:
        A, B = adapter.factors()
        kept = functional.dropout(x, adapter.dropout, layer.training) if adapter.dropout else x
        branch = functional.linear(functional.linear(in_dtype_of(kept, A), A), B)
        if not adapter.scales_rows:
            output = add_branch(output, branch, share * adapter.scaling)
            continue
        folded = bank.matrix.fold(cast("Tensor", own_parameters(layer)[bank.parameter]))
        output = add_scaled_branch(
            output,
            branch,
            adapter.scaling,
            share=share,
            gain=adapter.gain(folded),
            bare=_without_bias(layer, bank, x, folded, plain),
        )
    return output


def _without_bias(layer: nn.Module, bank: Bank, x: Tensor, folded: Tensor, plain: Tensor) -> Tensor:
    """``W x``, from the layer's output where it is plain what it added to that."""
    others = {name: each for name, each in own_parameters(layer).items() if name != bank.parameter}
    if not others:
        return plain
    if set(others) == {"bias"} and others["bias"].shape == plain.shape[-1:]:
        return plain - others["bias"]
    return functional.linear(in_dtype_of(x, folded), folded)
