"""ANCRe: every earlier state feeds every site with a learned, normalised coefficient.

Source: "ANCRe: adaptive neural connection reassignment", arXiv 2602.09009.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from architectures.shortcuts.base import Start, Topology, triangle

Normalization = Literal["incoming", "outgoing"]
Parameterization = Literal["softmax", "constant"]


class Ancre(Topology):
    """Coefficients that a softmax over logits makes.

    ``incoming``: those of one site sum to one, ``W_k = softmax(p_k / τ)`` with ``p_k`` of length
    ``k + 1``. ``outgoing``: those of one state sum to one, ``W_kj = softmax(q_j / τ)[k - j]``
    with ``q_j`` of length ``K - j``. Logits start at zero, so the coefficients start equal.

    The vector of length one gives the coefficient 1 whatever it holds, and its gradient is zero.

    ``init="identity"`` is not the authors': the matrix is ``softmax(p / τ) - softmax(p⁰ / τ)``
    with ``p⁰`` the logits at the start, a buffer. It starts at zero in every bit, and every
    coefficient of a softmax of two or more entries has a gradient from the first step on.

    Args:
        sites: Number of sites, K.
        init: ``uniform``, the authors', or ``identity``.
        temperature: τ. Saved with the coefficients, as the authors do.
        normalization: What sums to one.
        parameterization: ``softmax``, or ``constant``: the same with logits that stay at zero.
        device: Where its tensors live.

    Attributes:
        logits: ``(K (K + 1) / 2,)``, the vectors in order of ``k``, or of ``j``.
        temperature: τ, a scalar buffer.

    Raises:
        ValueError: the temperature is not positive, an option has another value than the ones
            above, or ``constant`` with ``identity``, whose coefficients would stay at zero.
    """

    options: ClassVar[frozenset[str]] = frozenset(
        {"temperature", "normalization", "parameterization"}
    )

    logits: Tensor
    temperature: Tensor
    initial_logits: Tensor

    def __init__(
        self,
        sites: int,
        *,
        init: Start | None = None,
        temperature: float = 1e-2,
        normalization: Normalization = "incoming",
        parameterization: Parameterization = "softmax",
        device: torch.device | str | None = None,
    ) -> None:
        _check(temperature, normalization, parameterization)
        if parameterization == "constant" and init == "identity":
            raise ValueError(
                "parameterization 'constant' with init 'identity' would stay at zero for ever; "
                "take init 'uniform', or parameterization 'softmax'"
            )
        super().__init__(sites, init=init, support=triangle(sites))
        self.normalization: Normalization = normalization
        self._start_temperature = temperature
        logits = torch.empty(sites * (sites + 1) // 2, dtype=torch.float32, device=device)
        if parameterization == "softmax":
            self.register_parameter("logits", nn.Parameter(logits))
        else:
            self.register_buffer("logits", logits)
        scalar = torch.empty((), dtype=torch.float32, device=device)
        self.register_buffer("temperature", scalar)
        if self.init == "identity":
            self.register_buffer("initial_logits", torch.empty_like(logits))
            self.support = _learned(sites, normalization)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Logits zero, and the temperature as it was given."""
        self.logits.zero_()
        self.temperature.fill_(self._start_temperature)
        if self.init == "identity":
            self.initial_logits.zero_()

    def forward(self) -> Tensor:
        """``(K, K)``, lower triangular."""
        if self.init == "uniform":
            return self._softmax(self.logits.unsqueeze(0))[0]
        now, start = self._softmax(torch.stack((self.logits, self.initial_logits)))
        return now - start

    def _softmax(self, logits: Tensor) -> Tensor:
        """``(n, K (K + 1) / 2)`` to ``(n, K, K)``: one softmax, masked above the diagonal."""
        sites, device = self.sites, logits.device
        if self.normalization == "incoming":
            row, column = torch.tril_indices(sites, sites, device=device)
        else:
            row, column = torch.triu_indices(sites, sites, device=device)
        scores = logits.new_full((logits.shape[0], sites, sites), -torch.inf)
        scores = scores.index_put(
            (torch.arange(len(logits), device=device)[:, None], row, column),
            logits / self.temperature,
        )
        weights = scores.softmax(-1)
        return weights if self.normalization == "incoming" else weights.mT

    def extra_repr(self) -> str:
        """Sites, init and normalisation, for ``print(model)``."""
        return f"{super().extra_repr()}, normalization={self.normalization}"


def _check(temperature: float, normalization: str, parameterization: str) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if normalization not in {"incoming", "outgoing"}:
        raise ValueError(f"normalization is 'incoming' or 'outgoing', got {normalization!r}")
    if parameterization not in {"softmax", "constant"}:
        raise ValueError(f"parameterization is 'softmax' or 'constant', got {parameterization!r}")


def _learned(sites: int, normalization: Normalization) -> tuple[tuple[int, ...], ...]:
    """The triangle without the coefficient that is one whatever its logit, and so never moves."""
    single = 0 if normalization == "incoming" else sites - 1
    return tuple(
        tuple(state for state in row if (site, state) != (single, single))
        for site, row in enumerate(triangle(sites))
    )
