"""DenseFormer: after every block, a learned average over the depth.

Source: "DenseFormer: enhancing information flow in transformers via depth weighted averaging",
arXiv 2402.02622.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from architectures.shortcuts.base import Start, Topology, triangle


class DenseFormer(Topology):
    """``x_{k+1} = Σ_{j≤k+1} α_kj X_j`` with ``X_0 = x_0`` and ``X_{j+1} = y_j``.

    The average is over what the blocks gave before averaging. A history holds what the blocks
    were given: ``x = A X`` with ``A`` the lower triangular matrix whose first row is ``e_0`` and
    whose row ``k + 1`` is ``α_k``. So ``Σ_{j≤k} α_kj X_j`` is row ``k`` of ``L A⁻¹ x``, with
    ``L`` the ``α_kj`` of ``j ≤ k``: one triangular solve turns one into the other.

    It starts at the identity, as published: ``α_kj`` is one for ``j = k + 1`` and zero else.

    Args:
        sites: Number of sites, K.
        init: ``identity`` alone.
        device: Where its tensor lives.

    Attributes:
        averages: ``(K (K + 1) / 2 + K,)``, the ``α_k`` of length ``k + 2`` in order of ``k``.

    Raises:
        ValueError: ``init`` is ``uniform``.
    """

    inits: ClassVar[tuple[Start, ...]] = ("identity",)
    weighs_sums: ClassVar[bool] = True

    averages: Tensor

    def __init__(
        self, sites: int, *, init: Start | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__(sites, init=init, support=triangle(sites))
        count = sites * (sites + 3) // 2
        self.averages = nn.Parameter(torch.empty(count, dtype=torch.float32, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """One for what the block gives, zero for the rest."""
        own = [site * (site + 5) // 2 + 1 for site in range(self.sites)]
        self.averages.zero_()[own] = 1.0

    def forward(self) -> Tensor:
        """``(K, K + 1)``: the coefficients of the ``x_j``, then the weights of the ``y_k``."""
        sites, alpha = self.sites, self.averages
        row, column = torch.tril_indices(sites, sites + 1, 1, device=alpha.device)
        average = alpha.new_zeros(sites, sites + 1).index_put((row, column), alpha)
        own = average.diagonal(1)
        first = torch.eye(1, sites, dtype=alpha.dtype, device=alpha.device)
        basis = torch.cat((first, average[:-1, :sites]))
        solve = cast("Callable[..., Tensor]", cast("Any", torch.linalg).solve_triangular)
        weights = solve(basis, average[:, :sites].tril(), upper=False, left=False)
        return torch.cat((weights, own[:, None]), dim=1)
