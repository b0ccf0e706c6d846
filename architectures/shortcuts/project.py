"""States that cross a cut: a place where a network changes the shape of what flows through it.

A sum needs states of one shape. Where the shape changes, every earlier state that is still needed
is brought to the new shape once, by one projection per cut: pooled to the new height and width
(He et al., arXiv 1512.03385, put a projection on the shortcut at these very places), and mapped by
a 1x1 convolution where the number of channels changes. A state that crosses two cuts goes through
both projections, one after the other::

    x_{k+1} = y_k + Σ_{j≤k} W_kj P_c(... P_b(x_j))      b, ..., c: the cuts between x_j and y_k
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from architectures.shortcuts import _torch
from architectures.shortcuts.base import Support
from architectures.shortcuts.history import History


class Cut(NamedTuple):
    """Where the state changes shape.

    Attributes:
        site: Index of a site.
        inside: Whether the block of that site changes the shape itself, rather than something
            between it and the block before.
    """

    site: int
    inside: bool

    def order(self) -> int:
        """A number that grows from each place to the next."""
        return 2 * self.site + self.inside


class Projection(nn.Module):
    """A state as one of the shape that states have after a cut.

    Args:
        before: Number of channels before the cut.
        after: Number of channels after it. A projection has a ``weight``, ``(after, before)``,
            only where they differ.
        axis: Which axis has the channels: 1, or -1.
        pooled: Whether height and width change.
        dtype: Of the weight.
        generator: A generator of the CPU for the weight; torch's global one if left out.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        before: int,
        after: int,
        *,
        axis: int,
        pooled: bool,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.before, self.after, self.axis, self.pooled = before, after, axis, pooled
        if before == after:
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.empty(after, before, dtype=dtype))
            self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal with variance 1 / ``before``, which keeps the scale of a state.

        Args:
            generator: A generator of the CPU; torch's global one if left out.
        """
        if self.weight is None or self.weight.is_meta:
            return
        values = torch.empty(self.after, self.before).normal_(
            0.0, self.before**-0.5, generator=generator
        )
        with torch.no_grad():
            self.weight.copy_(values)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """Bring a state to the shape of another.

        Args:
            x: ``(batch, before, height, width)``, or with the channels last and any dimensions
                between where nothing is pooled.
            like: A state after the cut, for its height and width.
        """
        if self.pooled:
            x = self._pooled(x, like)
        if self.weight is None:
            return x
        if self.axis == 1:
            return functional.conv2d(x, self.weight[:, :, None, None])
        return functional.linear(x, self.weight)

    def _pooled(self, x: Tensor, like: Tensor) -> Tensor:
        if self.axis == 1:
            return functional.adaptive_avg_pool2d(x, (like.shape[2], like.shape[3]))
        first = functional.adaptive_avg_pool2d(
            x.permute(0, 3, 1, 2), (like.shape[1], like.shape[2])
        )
        return first.permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        """Channels and what is done, for ``print(model)``."""
        return f"{self.before}, {self.after}, axis={self.axis}, pooled={self.pooled}"


class Crossing:
    """The states of one forward pass through blocks between which the shape changes.

    To be used like `History`, which it makes one of for each stretch between two cuts.

    Args:
        weights: ``W``, as for `History`.
        support: As for `History`.
        cuts: Where the shape changes, in order.
        projections: The projection of each cut.
    """

    def __init__(
        self,
        weights: Tensor,
        support: Support,
        cuts: Sequence[Cut],
        projections: Sequence[nn.Module],
    ) -> None:
        self._weights = weights
        self._support = support
        self._cuts = tuple(cuts)
        self._projections = tuple(projections)
        self._last = _last_users(support)
        self._states: dict[int, tuple[Tensor, int | None]] = {}
        self._passed = 0
        self._site = -1
        self._part = self._stretch()

    def enter(self, x: Tensor, site: int | None = None) -> Tensor:
        """Register the state that enters a site; see `History.enter`.

        Raises:
            RuntimeError: the sites are entered out of order, or one was left out whose block
                changes the shape.
        """
        entering = self._site + 1 if site is None else site
        self._pass(Cut(entering, False), x)
        self._site = entering
        if self._last[entering] >= entering:
            self._states[entering] = (x, self._version(x))
        return self._part.enter(x, entering)

    def leave(self, y: Tensor) -> Tensor:
        """Mix what the block of the current site gave with the states before it."""
        if self._pass(Cut(self._site, True), y):
            self._part.open(self._site)
        mixed = self._part.leave(y)
        self._states = {j: kept for j, kept in self._states.items() if self._last[j] > self._site}
        return mixed

    def _pass(self, place: Cut, like: Tensor) -> bool:
        """Bring all states past the cut at this place; False if there is none."""
        passed = self._up_to(place)
        if passed == self._passed:
            return False
        if passed > self._passed + 1 or self._cuts[self._passed] != place:
            missed = self._cuts[self._passed].site
            raise RuntimeError(f"site {missed}, where the state changes shape, was left out")
        projection = self._projections[self._passed]
        self._passed = passed
        self._part = self._stretch()
        for index, (state, version) in self._states.items():
            if version is not None and version != _torch.version(state):
                raise RuntimeError(
                    f"state {index} was modified in place before it was projected; the block must "
                    "not write into its input (look for `+=`, `add_` or `inplace=True`)"
                )
            projected = projection(state, like)
            self._states[index] = (projected, self._version(projected))
            self._part.hold(projected, index)
        return True

    def _version(self, state: Tensor) -> int | None:
        return None if _torch.symbolic(state, self._weights) else _torch.version(state)

    def _stretch(self) -> _Stretch:
        """A history that mixes at the sites between the last cut that was passed and the next."""
        rows = [
            row if self._up_to(Cut(site, True)) == self._passed else ()
            for site, row in enumerate(self._support)
        ]
        return _Stretch(self._weights, rows)

    def _up_to(self, place: Cut) -> int:
        """How many cuts there are up to a place, that place included."""
        return len([cut for cut in self._cuts if cut.order() <= place.order()])


class _Stretch(History):
    """A history that may begin with states which entered before it."""

    def hold(self, x: Tensor, site: int) -> None:
        """Register a state whose site was left already, or is being left."""
        self.enter(x, site)
        self._open = False

    def open(self, site: int) -> None:
        """Go on as if this site had just been entered."""
        self._site, self._open = site, True


def _last_users(support: Support) -> list[int]:
    """Per state, the last site that has a coefficient for it; -1 if none has."""
    last = [-1] * len(support)
    for site, row in enumerate(support):
        for state in row:
            last[state] = site
    return last
