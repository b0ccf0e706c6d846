"""The weight files of a saved model: found, checked, and read without running any code in them.

safetensors is what is read. A pickle (``.bin``) is read only through
``torch.load(weights_only=True)``, and refused where that does not do.
"""

from __future__ import annotations

import logging
import pickle
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from surgery.errors import CheckpointError
from surgery.sources.store import Store
from surgery.table import some
from surgery.untrusted.header import GIT_LFS, git_lfs_pointer, read_header
from surgery.untrusted.index import check_held, check_strays, read_index, shard_missing
from surgery.untrusted.paths import checked_file

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

_MAX_LISTED = 8


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold one model's weights.

    Attributes:
        paths: Every file, in order; more than one where the checkpoint is sharded.
        index: The index of a sharded checkpoint.
        pickled: Whether the files are pickles instead of safetensors.
    """

    paths: tuple[Path, ...]
    index: Path | None
    pickled: bool

    def fingerprints(self) -> list[dict[str, Any]]:
        """Name, size in bytes and header hash of each file; the hash of what is no header: none."""
        return [_fingerprint(path, self.pickled) for path in self.paths]


def find(
    store: Store, *, safetensors: str, pickled: str, variant: str | None = None
) -> WeightFiles:
    """Find and check the weight files of ``store``.

    Args:
        store: Where to look.
        safetensors: Stem of the safetensors file, such as ``model``.
        pickled: Stem of the pickle, such as ``pytorch_model``.
        variant: Variant in the file's name, such as ``fp16``.

    Raises:
        CheckpointError: no file, a truncated one, or shards and index that disagree.
    """
    for stem, suffix in ((safetensors, ".safetensors"), (pickled, ".bin")):
        single, index = _names(stem, suffix, variant)
        path = store.get(single)
        if path is not None:
            _refuse_both(store, single, index)
            _check_file(path)
            return WeightFiles((path,), None, suffix == ".bin")
        index_path = store.get(index)
        if index_path is not None:
            return WeightFiles(_shards(store, index_path, suffix), index_path, suffix == ".bin")
    raise _nothing_found(store, _names(safetensors, ".safetensors", variant)[0])


def _refuse_both(store: Store, single: str, index: str) -> None:
    # transformers reads the single file then, and diffusers what the index lists.
    if (store.folder / index).exists():
        raise CheckpointError(
            f"{store.label} holds {single} and {index}, and libraries differ in which they read",
            hint="move away the one that is not meant, with its shards",
        )


def read(files: WeightFiles) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, on the CPU; safetensors are memory-mapped.

    Raises:
        CheckpointError: a file is corrupt, or a pickle holds anything but tensors.
    """
    state: dict[str, Tensor] = {}
    for path in files.paths:
        state.update(_read_pickle(path) if files.pickled else _read_safetensors(path))
    return state


def check_fit(
    source: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Shape, Shape]],
    allow_missing: bool,
    allow_unexpected: bool,
) -> None:
    """Refuse a checkpoint that does not fit, so that nothing is re-initialised in silence.

    Args:
        source: The checkpoint, as named in messages.
        missing: Keys of the model that the checkpoint lacks.
        unexpected: Keys of the checkpoint that the model lacks.
        mismatched: (key, shape in the checkpoint, shape in the model).
        allow_missing: Accept missing and mismatched keys; they keep their random initialisation.
        allow_unexpected: Accept keys that the model has no place for.

    Raises:
        CheckpointError: listing every kind of misfit with keys and shapes.
    """
    shapes = [
        f"{key}: expected {list(expected)}, received {list(received)}"
        for key, received, expected in sorted(mismatched)
    ]
    absent, extra = sorted(missing), sorted(unexpected)
    problems: list[str] = []
    arguments: list[str] = []
    if absent or shapes:
        arguments.append("allow_missing=True to leave what is missing randomly initialised")
    if extra:
        arguments.append("allow_unexpected=True to ignore what has no place in the model")
    if absent and not allow_missing:
        problems.append(_listed("keys missing from the checkpoint", absent))
    if shapes and not allow_missing:
        problems.append(_listed("shapes that differ", shapes))
    if extra and not allow_unexpected:
        problems.append(_listed("keys the model does not have", extra))
    if problems:
        raise CheckpointError(
            f"{source} does not fit the model: {'; '.join(problems)}",
            hint=f"pass {' and '.join(arguments)}, or load the class the checkpoint was saved from",
        )
    if absent or shapes or extra:
        logger.warning(
            "%s: randomly initialised: %s; ignored: %s", source, [*absent, *shapes], extra
        )


def _listed(what: str, items: list[str]) -> str:
    return f"{len(items)} {what} ({some(items, _MAX_LISTED)})"


def _names(stem: str, suffix: str, variant: str | None) -> tuple[str, str]:
    middle = f".{variant}" if variant else ""
    # A variant stands before the suffix of a file, and in an index before ".json".
    return f"{stem}{middle}{suffix}", f"{stem}{suffix}.index{middle}.json"


def _shards(store: Store, index: Path, suffix: str) -> tuple[Path, ...]:
    by_file = read_index(index, suffix)
    paths = {name: _shard_path(store, index, name) for name in sorted(by_file)}
    for name, path in paths.items():
        held = _check_file(path)
        if held is not None:
            check_held(index, name, held, by_file[name])
    check_strays(index, paths, suffix)
    return tuple(paths.values())


def _shard_path(store: Store, index: Path, name: str) -> Path:
    path = store.get(name)
    if path is None:
        raise shard_missing(index, name)
    return path


def _check_file(path: Path) -> set[str] | None:
    """The names of the tensors in a file, checked; None for a pickle, which is not looked into."""
    if path.suffix == ".safetensors":
        return set(read_header(path).slots)
    checked_file(path)
    with path.open("rb") as file:
        if file.read(8) == GIT_LFS:
            raise git_lfs_pointer(path)
    return None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors
    from safetensors import torch as reader

    try:
        return cast("Any", reader).load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: corrupt: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it is a pickle that holds more than tensors, and unpickling it "
            f"could run code ({_first_line(error)})",
            hint="ask its author for safetensors, or convert it where you trust it",
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt: {_first_line(error)}") from error
    state = cast("dict[object, object]", loaded) if isinstance(loaded, dict) else None
    if state is None or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors only; it holds something else",
            hint="export the model's state_dict alone, best as safetensors",
        )
    logger.warning("%s is a pickle; it was read with weights_only=True", path)
    return cast("dict[str, Tensor]", loaded)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _nothing_found(store: Store, expected: str) -> CheckpointError:
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".json")
    there = [name for name in store.names() if name.endswith(suffixes)]
    return CheckpointError(
        f"{store.label} holds no weights: expected {expected} (or its .index.json); "
        f"found {', '.join(there) or 'no weight file at all'}{store.caveat}",
        hint="other formats are not read; pass pretrained=False to build from the configuration "
        "only, or variant= if the file's name carries one",
    )


def _fingerprint(path: Path, pickled: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": path.name, "bytes": path.stat().st_size}
    if not pickled:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            entry["header_sha256"] = sha256(file.read(length)).hexdigest()
    return entry
