"""The shortcuts of one run of blocks, as the module that holds their coefficients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from architectures.shortcuts import History, Mixer, Start, Support, Topology
from architectures.shortcuts.project import Crossing
from surgery.passes.streams import recorder
from surgery.passes.streams.ports import Stream
from surgery.tree import children, named_modules

#: Name of the child under which a holder of blocks keeps its segments.
CHILD = "shortcuts"


class Fixed(Topology):
    """Coefficients that are not learned any more.

    Args:
        weights: (K, K) or (K, K + 1), zero where there is no edge.
        support: Per site, the states that have an edge to it.
    """

    inits: ClassVar[tuple[Start, ...]] = ("uniform",)
    weights: Tensor

    def __init__(self, weights: Tensor, support: Support) -> None:
        super().__init__(len(support), init=None, support=support)
        self.register_buffer("weights", weights.clone())

    def reset_parameters(self) -> None:
        """Nothing: the values were learned, and can only come from a checkpoint."""

    def forward(self) -> Tensor:
        """The weights."""
        return self.weights


class Segment(Mixer):
    """The coefficients of a run of blocks, and how states enter and leave those.

    Args:
        topology: Gives the coefficients.
        diagonal: Added to them on the diagonal before they are used.
        shown: Added on the diagonal of the matrix that is shown.
        members: Names of the blocks in their holder, in order.
        streams: The tensors that make up the state.
        counts: How many sites each block has, where every residual addition is one; None where
            a block is a site.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        diagonal: float,
        shown: float,
        members: Sequence[str],
        streams: Sequence[Stream],
        counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(topology, diagonal=diagonal, shown=shown)
        self.members = tuple(members)
        self.streams = tuple(streams)
        self.counts = None if counts is None else tuple(counts)
        self.frozen: Fixed | None = None
        recorder.connect()

    def forward(self) -> Tensor:
        """What the states are mixed with; see `Mixer`."""
        return super().forward() if self.frozen is None else self.frozen()

    def history(self, weights: Tensor) -> History | Crossing:
        """The start of one forward pass of one stream.

        Args:
            weights: What calling this segment gave.
        """
        return History(weights, self.edges)

    @property
    def edges(self) -> Support:
        """Per site, the states whose coefficient may differ from zero."""
        return self.support if self.frozen is None else self.frozen.support

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # pyright: ignore[reportUnknownMemberType]
        recorder.connect()


class Segments(nn.ModuleDict):
    """The segments of one holder of blocks, by number."""

    def segments(self) -> list[Segment]:
        """In the order of their blocks."""
        return [cast("Segment", segment) for segment in children(self).values()]


def segments_of(holder: nn.Module) -> Segments | None:
    """The segments a holder of blocks has; None before any was added."""
    found = children(holder).get(CHILD)
    return found if isinstance(found, Segments) else None


def all_segments(model: nn.Module) -> Iterator[tuple[str, str, Segment]]:
    """Path of the holder, number and segment of everything that was rewired in a model."""
    for path, module in named_modules(model, duplicates=False):
        if isinstance(module, Segments):
            holder = path.rpartition(".")[0]
            for number, segment in children(module).items():
                yield holder, number, cast("Segment", segment)


def shortcuts(model: nn.Module) -> dict[str, Tensor]:
    """Name of every rewired run of blocks → its (K, K) coefficients.

    Entry (k, j) is the weight of the state that enters block j in the sum that leaves block k;
    see ``architectures.shortcuts``.
    """
    found: dict[str, Tensor] = {}
    for holder, _, segment in all_segments(model):
        first, last = segment.members[0], segment.members[-1]
        found[f"{holder or '(the model)'} {first}..{last}"] = segment.matrix()
    return found


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of a model as two groups for an optimizer.

    Decay would pull the logits of a softmax together, and coefficients towards no connection at
    all, so the second group, which holds them, has none::

        torch.optim.AdamW(surgery.parameter_groups(model, weight_decay=0.1), lr=1e-3)

    Args:
        model: Rewired or not; without coefficients the second group is left out.
        weight_decay: Of the first group.
    """
    segments = [segment for *_, segment in all_segments(model)]
    coefficients = {id(p) for segment in segments for p in segment.topology.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in trained if id(p) not in coefficients],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in trained if id(p) in coefficients], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
