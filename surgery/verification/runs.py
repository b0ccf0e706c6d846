"""One call of a model under controlled conditions, and everything that came out of it."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from surgery.copies import buffers_put_back
from surgery.sources import Example
from surgery.tree import named_parameters
from surgery.verification.outputs import leaves

_SEED = 1234

# Typed views of functions that torch leaves half typed.
_fork = cast("Callable[..., AbstractContextManager[None]]", torch.random.fork_rng)  # pyright: ignore[reportUnknownMemberType]
_seed = cast("Callable[[int], object]", torch.manual_seed)  # pyright: ignore[reportUnknownMemberType]


@dataclass
class Run:
    """What one call gave.

    Attributes:
        outputs: Path → tensor or plain value.
        buffers: Name → value after the call.
        gradients: Parameter name → gradient of a random projection of the outputs; None for a
            parameter that got none. Empty unless gradients were asked for.
        saved_bytes: Bytes of the tensors that autograd kept for the backward.
        error: The exception that the call raised, if it did.
    """

    outputs: dict[str, Any] = field(default_factory=dict[str, Any])
    buffers: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    gradients: dict[str, Tensor | None] = field(default_factory=dict[str, "Tensor | None"])
    saved_bytes: int = 0
    error: Exception | None = None


def run(model: nn.Module, example: Example, *, training: bool, gradients: bool = False) -> Run:
    """Call a copy of a model once.

    Every random draw is seeded by what is drawn, not by what was drawn before it: a dropout that
    a rewrite inserted does not shift the masks of the model's own.

    Args:
        model: A copy to measure on; its buffers are put back afterwards.
        example: The call.
        training: Whether in train mode.
        gradients: Whether to compute the gradients of all parameters that require them.
    """
    model.train(training)
    result = Run()
    saved = _Saved(model)
    watch = torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor)
    with seeded(model), buffers_put_back(model):
        try:
            draws = _EachDrawSeeded() if training else nullcontext()
            with draws, watch if gradients else torch.no_grad():
                output = model(*_fresh(example).args, **_fresh(example).kwargs)
            result.outputs = leaves(output)
            if gradients:
                result.gradients = _gradients(model, result.outputs)
        except Exception as error:  # noqa: BLE001 - whatever a model raises is what is reported
            result.error = error
        result.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result.outputs = {path: _detached(leaf) for path, leaf in result.outputs.items()}
    result.saved_bytes = saved.nbytes
    return result


def count_flops(model: nn.Module, example: Example) -> int | None:
    """Floating-point operations of one forward in eval mode; None if it raises."""
    model.eval()
    counter = FlopCounterMode(display=False, custom_mapping=_COUNTED)
    with seeded(model), buffers_put_back(model), torch.no_grad(), counter:
        try:
            model(*_fresh(example).args, **_fresh(example).kwargs)
        except Exception:  # noqa: BLE001 - the comparison of outputs reports it
            return None
    return counter.get_total_flops()


def _product(a: Sequence[int], b: Sequence[int]) -> int:
    """Operations of a product of matrices, (..., M, K) and (..., K, N), or of groups of rows."""
    return 2 * math.prod(a) * b[-1]


def _grouped_mm_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    return _product(a, b)


def _added_flops(_: Sequence[int], a: Sequence[int], b: Sequence[int], *__: Any, **___: Any) -> int:
    return _product(a, b)


#: Devices that have no generator besides the CPU's.
_NO_DRAWS = ("cpu", "meta")
#: What torch's counter leaves out: the products of experts, and sums in place, as of adapters.
_COUNTED: dict[Any, Callable[..., int]] = {
    torch.ops.aten._grouped_mm: _grouped_mm_flops,  # pyright: ignore[reportPrivateUsage]
    torch.ops.aten.addmm_: _added_flops,
    torch.ops.aten.baddbmm_: _added_flops,
}


@contextmanager
def seeded(model: nn.Module) -> Generator[None]:
    """Seed every generator a forward may draw from; put all of them back afterwards."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is what models use
    # A model on several devices has them of one kind.
    devices = {each.device for each in model.parameters() if each.device.type not in _NO_DRAWS}
    kind = next((device.type for device in devices), "cuda")
    try:
        with _fork([device for device in devices if device.type == kind], device_type=kind):
            _seed(_SEED)
            random.seed(_SEED)
            np.random.seed(_SEED)  # noqa: NPY002 - as above
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002 - as above


class _EachDrawSeeded(TorchDispatchMode):
    """Seeds torch's generator before each operation that draws, by its name and shapes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in args]
            _seed(zlib.crc32(f"{func}{shapes}".encode()))
        return func(*args, **(kwargs or {}))


class _Saved:
    """Counts the memory that autograd keeps, weights left out."""

    def __init__(self, model: nn.Module) -> None:
        self.nbytes = 0
        self._seen = {_storage(parameter) for parameter in model.parameters()}

    def note(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in self._seen:
            self._seen.add(key)
            self.nbytes += tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _fresh(example: Example) -> Example:
    """The same call on copies, so that a model that writes into its input changes nothing."""
    return example.map(lambda tensor: tensor.detach().clone())


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _gradients(model: nn.Module, outputs: Mapping[str, Any]) -> dict[str, Tensor | None]:
    names = [name for name, p in named_parameters(model, duplicates=False) if p.requires_grad]
    parameters = dict(named_parameters(model))
    loss = _projection(outputs)
    if loss is None or not names:
        return dict.fromkeys(names)
    wanted = [parameters[name] for name in names]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return dict(zip(names, found, strict=True))


def _projection(outputs: Mapping[str, Any]) -> Tensor | None:
    """A random projection of every differentiable output to one number.

    A plain sum would not do: the outputs of a layer norm sum to a constant.
    """
    generator = torch.Generator().manual_seed(_SEED)
    total: Tensor | None = None
    for leaf in outputs.values():
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            continue
        value = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        weights = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        term = (value * weights).sum(dtype=_sum_dtype(value))
        total = term if total is None else total + term.to(total)
    return total


def _sum_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32
