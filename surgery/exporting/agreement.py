"""How far what an exported model computes is from what the model itself computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import ExportError
from surgery.sources import Example
from surgery.verification.outputs import leaves

#: Largest deviation, relative to the largest value of a tensor. Another runtime adds up in
#: another order with other kernels: some hundred roundings, which the layers of a model amplify.
#: In float64 the float32 softmax of learned coefficients is what is left.
BOUNDS: Mapping[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
_SMALLEST = 1e-3


@dataclass(frozen=True)
class Agreement:
    """The outcome of comparing outputs.

    Attributes:
        consumer: What loaded the export and ran it, with its version.
        calls: The calls that were compared, in words, such as ``batch 2``.
        deviation: The largest deviation of an output tensor, relative to its largest value;
            infinite where shapes differ or a value is not finite on one side only.
        where: The call and the tensor of the largest deviation.
        bound: What ``deviation`` may be.
    """

    consumer: str
    calls: tuple[str, ...]
    deviation: float
    where: str
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the export computes what the model computes."""
        return self.deviation <= self.bound

    def check(self) -> None:
        """Raise unless the export computes what the model computes.

        Raises:
            ExportError: it does not; the message says where it differs most.
        """
        if not self.ok:
            raise ExportError(
                f"{self.consumer} computes something else than the model: {self.where} deviates "
                f"by {self.deviation:.1e} of its largest value, at most {self.bound:.0e} is "
                "expected; nothing was written",
                hint="please report it with the model and its rules",
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.consumer}: {len(self.calls)} calls ({', '.join(self.calls)}), largest "
            f"deviation {self.deviation:.1e} (bound {self.bound:.0e})"
        )


def outputs(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """The floating tensors of what a model returns, by their path in it, without gradients."""
    fresh = example.map(lambda tensor: tensor.detach().clone())
    with torch.no_grad():
        return floating(model(*fresh.args, **fresh.kwargs))


def floating(output: object) -> dict[str, Tensor]:
    """The floating tensors of a structured output by their path; those of a cache included."""
    found = leaves(output)
    return {path: t for path, t in found.items() if isinstance(t, Tensor) and _real(t)}


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def agreement(
    consumer: str,
    compared: Iterable[tuple[str, Mapping[str, Tensor], Mapping[str, Tensor]]],
    *,
    bound: float | None = None,
) -> Agreement:
    """Compare outputs.

    Args:
        consumer: What ran the export, with its version.
        compared: For each call its name, what the model returned and what the consumer returned,
            as tensors by path.
        bound: The largest relative deviation; by default that of the least precise output.

    Raises:
        ExportError: there is nothing to compare.
    """
    calls: list[str] = []
    worst, where, widest = -1.0, "", 0.0
    for call, expected, found in compared:
        calls.append(call)
        for path, tensor in expected.items():
            off = _deviation(tensor, found.get(path))
            widest = max(widest, BOUNDS.get(tensor.dtype, BOUNDS[torch.float32]))
            if off > worst:
                worst, where = off, f"{path} ({call})"
        for path in found.keys() - expected.keys():
            worst, where = math.inf, f"{path} ({call}), which the model does not return,"
    if worst < 0:
        raise ExportError(
            "the model returns no floating tensor, so an export of it cannot be verified"
        )
    return Agreement(consumer, tuple(calls), worst, where, widest if bound is None else bound)


def _deviation(expected: Tensor, found: Tensor | None) -> float:
    if found is None or found.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    one, other = expected.detach().cpu().to(wide), found.detach().cpu().to(wide)
    same = one == other
    if bool(same.all()):
        return 0.0
    largest = float(torch.where(one.abs().isfinite(), one.abs(), 0.0).max())
    off = float(torch.where(same, 0.0, (one - other).abs()).max())
    return math.inf if math.isnan(off) else off / max(largest, _SMALLEST)
