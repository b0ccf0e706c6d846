"""How PEFT lays out the tensors of one adapted layer, and how they read as factors.

Of a linear layer they are our factors as they are. An embedding is adapted from the other side
(A holds the rows of the table), a convolution's A is a kernel, and the weights of a stack of
experts lie flattened in two matrices with the expert as the slowest index of A's rows and the
fastest of B's columns. Source: ``peft/tuners/lora/layer.py`` (peft 0.21).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from architectures.adapters import Matrix

#: What PEFT wraps: a linear layer (HF's Conv1D included), an embedding, a convolution, or a
#: parameter of a module (``target_parameters``).
Kind = Literal["linear", "embedding", "conv", "parameter"]

_KINDS: Mapping[str, Kind] = {
    "linear": "linear",
    "output": "linear",
    "embedding": "embedding",
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "weight": "parameter",
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"


def kind_of(host: str, module: nn.Module, matrix: Matrix) -> Kind:
    """What PEFT has to wrap for a module with this host to compute the same.

    Raises:
        ValueError: PEFT has nothing that computes it; the message says why.
    """
    kind = _KINDS[host]
    if host == "output" and not isinstance(module, nn.Linear) and not matrix.transposed:
        raise ValueError(
            f"PEFT adapts nn.Linear, nn.Embedding, convolutions and HF's Conv1D, and a "
            f"{type(module).__name__} is none of them"
        )
    if kind == "conv":
        _check_convolution(module)
    if kind == "parameter" and len(matrix.shape) != 2 + min(len(matrix.stack), 1):
        raise ValueError(
            f"PEFT adapts parameters that are a matrix or one stack of matrices, and this one is "
            f"{list(matrix.shape)}"
        )
    return kind


def _check_convolution(module: nn.Module) -> None:
    if not isinstance(module, _CONVOLUTIONS):
        raise ValueError(f"a {type(module).__name__} is no convolution of torch")
    if module.groups > 1:
        raise ValueError(
            f"it is a convolution of {module.groups} groups, and PEFT's A sees all channels"
        )
    if any(step != 1 for step in module.dilation):
        raise ValueError("it is a dilated convolution, and PEFT's A is not dilated")
    if module.padding_mode != "zeros":
        raise ValueError(f"it pads with {module.padding_mode!r}, and PEFT's A pads with zeros")


def laid_out(
    kind: Kind,
    module: nn.Module,
    matrix: Matrix,
    A: Tensor,
    B: Tensor,
    *,
    magnitude: Tensor | None,
) -> dict[str, Tensor]:
    """The tensors PEFT has for a layer, by the last part of their key.

    Args:
        kind: What PEFT wraps.
        module: The adapted module.
        matrix: How its weight is read as a matrix.
        A: (*stack, rank, columns).
        B: (*stack, rows, rank).
        magnitude: (rows,), or None.

    Raises:
        ValueError: PEFT has no magnitude for this kind.
    """
    if kind == "parameter":
        if magnitude is not None:
            raise ValueError("PEFT has no DoRA for a parameter of a module")
        return _named(LINEAR, _of_parameter(module, matrix, A, B))
    if kind == "embedding":
        if magnitude is not None:
            raise ValueError("scaled rows of an embedding are columns to PEFT's DoRA")
        return _named(EMBEDDING, (B.T, A.T))
    found = _named(LINEAR, (A, B))
    if kind == "conv":
        ones = [1] * (len(matrix.shape) - 2)
        kernel, pointwise = A.reshape(-1, *matrix.shape[1:]), B.reshape(*B.shape, *ones)
        found = _named(LINEAR, (kernel, pointwise))
        if magnitude is not None:
            found[MAGNITUDE] = magnitude.reshape(1, -1, *ones)
    elif magnitude is not None:
        found[MAGNITUDE] = magnitude
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _named(names: tuple[str, str], pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in zip(names, pair, strict=True)}


def _of_parameter(module: nn.Module, matrix: Matrix, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    if not matrix.stack:
        # PEFT reads the parameter as it is stored.
        return (B.T, A.T) if matrix.transposed else (A, B)
    if _stores_inputs_first(module):
        return _flat(B.transpose(-2, -1), A.transpose(-2, -1))
    return _flat(A, B)


def _flat(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A as (experts · rank, in); B as (out, rank · experts), the expert the fastest index."""
    return A.reshape(-1, A.shape[-1]), B.permute(1, 2, 0).reshape(B.shape[1], -1)


def _stores_inputs_first(module: nn.Module) -> bool:
    """Whether PEFT takes a stack of matrices as (experts, in, out).

    transformers says so of its experts modules by the attribute that PEFT asks for.
    """
    return bool(getattr(module, "is_transposed", False))


def factors(
    kind: Kind, module: nn.Module, matrix: Matrix, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``A`` (*stack, rank, columns), ``B`` (*stack, rows, rank) and the magnitude (rows,) or None.

    The inverse of ``laid_out``.

    Raises:
        ValueError: the tensors do not have the shapes of such a layer.
    """
    names = EMBEDDING if kind == "embedding" else LINEAR
    absent = [name for name in names if name not in tensors]
    if absent:
        raise ValueError(f"it has no {absent[0]}")
    first, second = (tensors[name] for name in names)
    rank = first.shape[0] // (matrix.stack[0] if kind == "parameter" and matrix.stack else 1)
    expected = laid_out(
        kind,
        module,
        matrix,
        torch.empty(*matrix.stack, rank, matrix.columns, device="meta"),
        torch.empty(*matrix.stack, matrix.rows, rank, device="meta"),
        magnitude=torch.empty(matrix.rows, device="meta") if MAGNITUDE in tensors else None,
    )
    for name, like in expected.items():
        if tensors[name].shape != like.shape:
            raise ValueError(
                f"its {name} is {list(tensors[name].shape)}, expected {list(like.shape)}"
            )
    magnitude = tensors[MAGNITUDE].reshape(-1) if MAGNITUDE in tensors else None
    if kind == "embedding":
        return second.T, first.T, None
    if kind == "parameter":
        A, B = _to_parameter(module, matrix, first, second)
        return A, B, None
    return first.reshape(rank, -1), second.reshape(-1, rank), magnitude


def _to_parameter(
    module: nn.Module, matrix: Matrix, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    if not matrix.stack:
        return (second.T, first.T) if matrix.transposed else (first, second)
    experts = matrix.stack[0]
    A = first.reshape(experts, -1, first.shape[-1])
    B = second.reshape(second.shape[0], -1, experts).permute(2, 0, 1)
    if _stores_inputs_first(module):
        return B.transpose(-2, -1), A.transpose(-2, -1)
    return A, B
