"""What every topology is: one coefficient per pair of sites, as a lower triangular matrix.

A site is a place where a residual network adds a shortcut. With ``x_k`` the state that enters
site ``k`` and ``y_k`` what its block makes of it, a topology says what flows on::

    x_{k+1} = y_k + Σ_{j≤k} W_kj x_j

A topology knows neither the network nor the tensors it mixes: its forward gives the matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

#: How a topology starts: as published, or so that the network computes what it did before.
Start = Literal["uniform", "identity"]
#: ``support[k]``: the states ``j`` whose coefficient at site ``k`` may ever differ from zero.
Support = tuple[tuple[int, ...], ...]


class Topology(nn.Module, ABC):
    """Coefficients of the earlier states at every site. Lives in float32, or wider.

    ``.to(torch.bfloat16)``, ``.half()`` and the like move its tensors and keep them in float32:
    a step of the optimizer is lost on a coefficient that has eight bits of mantissa.

    Args:
        sites: Number of sites, K.
        init: How it starts, one of ``inits``.

    Attributes:
        sites: Number of sites, K.
        support: Per site, the states whose coefficient may ever differ from zero.
        init: How it started.

    Raises:
        ValueError: there is no site, or the topology cannot start that way.
    """

    #: Names of the keyword arguments its constructor takes, ``init`` and ``device`` aside.
    options: ClassVar[frozenset[str]] = frozenset()
    #: The ways it can start, its own default first.
    inits: ClassVar[tuple[Start, ...]] = ("uniform", "identity")
    #: Whether ``forward`` also gives weights of the ``y_k``, ``(K, K + 1)``.
    weighs_sums: ClassVar[bool] = False

    def __init__(self, sites: int, *, init: Start | None, support: Support) -> None:
        super().__init__()
        if sites < 1:
            raise ValueError(f"a topology needs one site or more, got {sites}")
        init = self.inits[0] if init is None else init
        if init not in self.inits:
            raise ValueError(f"{type(self).__name__} cannot start with init {init!r}: {self.why()}")
        self.sites = sites
        self.init: Start = init
        self.support = support

    @classmethod
    def why(cls) -> str:
        """What an init that is refused is answered with."""
        return f"expected {' or '.join(repr(name) for name in cls.inits)}"

    @abstractmethod
    def reset_parameters(self) -> None:
        """Give every tensor its first value, in place, as after ``to_empty``."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The coefficients, ``(K, K)``, zero above the diagonal.

        A topology that also scales what the block gives returns ``(K, K + 1)``: the last
        column holds the weights of ``y_k``. The dtype is that of its tensors.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def at_least_float32(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if not _narrow(applied):
                return applied
            return tensor.to(applied.device, torch.float32)

        # torch leaves the argument of `_apply` untyped.
        return super()._apply(at_least_float32, recurse)  # pyright: ignore[reportUnknownMemberType]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # With `assign=True` the tensors of the checkpoint become those of the module.
        for name, value in list(state_dict.items()):
            if name.startswith(prefix) and isinstance(value, Tensor) and _narrow(value):
                state_dict[name] = value.float()
        load = cast("Callable[..., None]", super()._load_from_state_dict)  # pyright: ignore[reportUnknownMemberType]
        load(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Sites and init, for ``print(model)``."""
        return f"sites={self.sites}, init={self.init}"


def _narrow(tensor: Tensor) -> bool:
    """Whether the tensor holds floating-point numbers of fewer than 32 bits."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def triangle(sites: int) -> Support:
    """Every state at every site it precedes: ``support[k]`` is ``(0, ..., k)``."""
    return tuple(tuple(range(site + 1)) for site in range(sites))
