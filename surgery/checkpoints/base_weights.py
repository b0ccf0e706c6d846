"""Which stock weights an adapter belongs to: one SHA-256 for each of their tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any, cast

from torch import Tensor

from surgery import progress
from surgery.checkpoints.inventory import is_quantised
from surgery.checkpoints.tensorfile import as_bytes
from surgery.errors import CheckpointError


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The SHA-256 of each tensor's dtype, shape and bytes, by name.

    Reads every weight once: about 0.6 s per GB and core with the SHA instructions of current
    processors. A tensor on an accelerator is copied to the CPU, one at a time per worker.
    """
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with (
        progress.task("hashing stock weights", total, "bytes") as task,
        ThreadPoolExecutor(os.cpu_count()) as workers,
    ):
        found: dict[str, str] = {}
        for name, digest in zip(tensors, workers.map(digest_of, tensors.values()), strict=True):
            found[name] = digest
            task.advance(tensors[name].numel() * tensors[name].element_size())
    return found


def digest_of(tensor: Tensor) -> str:
    """The SHA-256 of one tensor; a quantised one is hashed through the tensors it is made of."""
    digest = sha256()
    for part, inner in _parts(tensor, ""):
        digest.update(f"{part}:{inner.dtype}:{tuple(inner.shape)};".encode())
        digest.update(as_bytes(inner))
    return digest.hexdigest()


def _parts(tensor: Tensor, path: str) -> list[tuple[str, Tensor]]:
    if not is_quantised(tensor):
        return [(path, tensor)]
    names, _ = cast("tuple[list[str], Any]", tensor.__tensor_flatten__())  # type: ignore[attr-defined]
    kind = type(tensor).__name__
    return [
        pair for name in names for pair in _parts(getattr(tensor, name), f"{path}/{kind}.{name}")
    ]


def check(saved: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Compare stock weights with those an adapter was trained on.

    Raises:
        CheckpointError: a tensor is missing, or holds other bytes, or has another dtype.
    """
    missing = [name for name in saved if name not in tensors]
    extra = [name for name in tensors if name not in saved]
    if missing or extra:
        lacks = f"the model has no {missing[0]}" if missing else f"the adapter knows no {extra[0]}"
        raise CheckpointError(
            f"the adapter belongs to another model: {lacks} "
            f"({len(missing)} names missing, {len(extra)} more than expected)",
            hint="pass the model that the adapter was saved from",
        )
    now = digests({name: tensors[name] for name in saved})
    different = [name for name in saved if now[name] != saved[name]]
    if different:
        raise CheckpointError(
            f"the adapter belongs to other stock weights: {len(different)} of {len(saved)} tensors "
            f"differ, first {different[0]} ({tensors[different[0]].dtype})",
            hint="load the weights and the dtype it was trained on, or pass allow_other_base=True",
        )
