"""Which way round a class of one matrix multiplies, found by watching it do so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.capture.graft import stock_class
from surgery.tree import own_parameters

_LINEAR = (torch.nn.functional.linear,)
_PRODUCT = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_SUM_AND_PRODUCT = (torch.addmm, Tensor.addmm)

_found: dict[tuple[type, str], bool | None] = {}


def is_transposed(module: nn.Module, name: str) -> bool | None:
    """Whether a layer multiplies by its matrix as stored, ``x W``, and not by ``W`` transposed.

    Args:
        module: A layer without children around one matrix.
        name: The name of the matrix.

    Returns:
        True for ``x W + b`` (HF's Conv1D), False for ``x Wᵀ + b`` (``F.linear``), and None if
        the layer does anything else with its matrix.
    """
    key = (stock_class(module), name)
    if key not in _found:
        _found[key] = _watch(module, name)
    return _found[key]


def _watch(module: nn.Module, name: str) -> bool | None:
    parameters = {n: p.detach().to("meta") for n, p in own_parameters(module).items()}
    matrix = parameters[name]
    twin = object.__new__(stock_class(module))
    twin.__dict__ = {**module.__dict__, "_parameters": parameters}
    for width, transposed in ((matrix.shape[0], True), (matrix.shape[1], False)):
        watcher = _Watcher(matrix)
        x = torch.empty(2, width, device="meta", dtype=matrix.dtype)
        try:
            with torch.no_grad(), watcher:
                made: object = cast("Any", stock_class(module).forward)(twin, x)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            # It does not take a batch of vectors of this width.
            continue
        if isinstance(made, Tensor) and watcher.uses == [transposed]:
            return transposed
    return None


class _Watcher(TorchFunctionMode):
    """Notes every use of a matrix: True and False as in ``is_transposed``, None for another."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.uses: list[bool | None] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = [*args, *(kwargs or {}).values()]
        if any(value is self.matrix for value in given) and "__get__" not in func.__name__:
            self.uses.append(self._use(func, args))
        return func(*args, **(kwargs or {}))

    def _use(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool | None:
        def stands_at(position: int) -> bool:
            return len(args) > position and args[position] is self.matrix

        if func in _LINEAR and stands_at(1):
            return False
        if (func in _PRODUCT and stands_at(1)) or (func in _SUM_AND_PRODUCT and stands_at(2)):
            return True
        return None
