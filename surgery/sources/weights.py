"""The weight files of a saved model: found, checked, and read without running any code in them.

safetensors is what is read. A pickle (``.bin``) is read only through
``torch.load(weights_only=True)``, and refused where that does not do.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

import torch
from torch import Tensor

from surgery.errors import CheckpointError
from surgery.sources.store import Store, read_json

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
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
            _check_file(path)
            return WeightFiles((path,), None, suffix == ".bin")
        index_path = store.get(index)
        if index_path is not None:
            return WeightFiles(_shards(store, index_path, suffix), index_path, suffix == ".bin")
    raise _nothing_found(store, _names(safetensors, ".safetensors", variant)[0])


def read(files: WeightFiles) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, on the CPU; safetensors are memory-mapped.

    Raises:
        CheckpointError: a file is corrupt, or a pickle holds anything but tensors.
    """
    state: dict[str, Tensor] = {}
    for path in files.paths:
        state.update(_read_pickle(path) if files.pickled else _read_safetensors(path))
    return state


def read_header(path: Path) -> dict[str, Shape]:
    """Name and shape of every tensor in a safetensors file, after checking that it is whole.

    Raises:
        CheckpointError: the file is truncated, longer than its header says, or not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        _refuse_pointer(path, start)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > size - 8:
            expected = "at least 8 bytes" if length is None else f"a header of {length} bytes"
            raise CheckpointError(
                f"{path}: truncated or not safetensors: expected {expected}, the file has {size}",
                hint="download or copy the file again",
            )
        raw = file.read(length)
    header = _parse_header(path, raw)
    end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    if size != 8 + len(raw) + end:
        raise CheckpointError(
            f"{path}: expected {8 + len(raw) + end} bytes according to its header, got {size}",
            hint="the file is truncated or corrupt; download or copy it again",
        )
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


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
    shown = ", ".join(items[:_MAX_LISTED])
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return f"{len(items)} {what} ({shown}{more})"


def _names(stem: str, suffix: str, variant: str | None) -> tuple[str, str]:
    middle = f".{variant}" if variant else ""
    # A variant stands before the suffix of a file, and in an index before ".json".
    return f"{stem}{middle}{suffix}", f"{stem}{suffix}.index{middle}.json"


def _shards(store: Store, index_path: Path, suffix: str) -> tuple[Path, ...]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: expected a non-empty 'weight_map'")
    mapping = cast("dict[str, object]", weight_map)
    by_shard: dict[str, set[str]] = {}
    for key, shard in mapping.items():
        by_shard.setdefault(_shard_name(index_path, key, shard, suffix), set()).add(key)
    paths = {name: _shard_path(store, index_path, name) for name in sorted(by_shard)}
    for name, path in paths.items():
        _check_file(path)
        if suffix == ".safetensors":
            _check_shard(index_path, name, set(read_header(path)), by_shard[name])
    _check_strays(index_path, set(paths), suffix)
    return tuple(paths.values())


def _shard_name(index_path: Path, key: str, shard: object, suffix: str) -> str:
    if not isinstance(shard, str):
        raise CheckpointError(f"{index_path}: {key!r} is mapped to {shard!r}, expected a file name")
    inside = (
        len(PurePosixPath(shard).parts) == 1
        and len(PureWindowsPath(shard).parts) == 1
        and shard not in (".", "..")
    )
    if not inside:
        raise CheckpointError(
            f"{index_path}: {key!r} is mapped to {shard!r}, which lies outside the folder"
        )
    if not shard.endswith(suffix):
        raise CheckpointError(f"{index_path}: {shard!r} is no {suffix} file")
    return shard


def _shard_path(store: Store, index_path: Path, name: str) -> Path:
    path = store.get(name)
    if path is None:
        raise CheckpointError(
            f"{index_path} names the shard {name!r}, which is not there",
            hint="the checkpoint is incomplete; download or copy it again",
        )
    return path


def _check_shard(index_path: Path, name: str, held: set[str], listed: set[str]) -> None:
    if absent := sorted(listed - held):
        raise CheckpointError(
            f"{index_path} says that {name!r} holds {absent[0]!r}, which it does not "
            f"({len(absent)} such keys)"
        )
    if extra := sorted(held - listed):
        raise CheckpointError(
            f"{name!r} holds {extra[0]!r}, which {index_path} does not list "
            f"({len(extra)} such keys)"
        )


def _check_strays(index_path: Path, known: set[str], suffix: str) -> None:
    stem = index_path.name.partition(suffix)[0]
    strays = [
        name
        for name in sorted(path.name for path in index_path.parent.iterdir())
        if name.startswith(stem)
        and name.endswith(suffix)
        and _SHARD.search(name.removesuffix(suffix))
        and name not in known
    ]
    if strays:
        raise CheckpointError(
            f"the shard {strays[0]!r} is there, but {index_path} does not list it",
            hint="the index belongs to another save of the model; download or copy both again",
        )


def _check_file(path: Path) -> None:
    if path.suffix == ".safetensors":
        read_header(path)
        return
    with path.open("rb") as file:
        _refuse_pointer(path, file.read(8))


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start == b"version ":
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights", hint="run `git lfs pull` in its folder"
        )


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        loaded: object = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: its header is not JSON; this is no safetensors file"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: its header is no JSON object")
    header = cast("dict[str, Any]", loaded)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(
            cast("dict[str, Any]", entry)
        ):
            raise CheckpointError(f"{path}: the header entry of {name!r} is malformed")
    return header


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
