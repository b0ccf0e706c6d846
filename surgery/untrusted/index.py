"""The index of a sharded checkpoint: which tensor lies in which file beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from surgery.errors import CheckpointError
from surgery.untrusted.documents import read_object
from surgery.untrusted.paths import plain_name, short

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def read_index(path: Path, suffix: str) -> dict[str, set[str]]:
    """The names of the tensors that each file is said to hold, by the file's name.

    Args:
        path: Such as ``model.safetensors.index.json``.
        suffix: How the files' names end, such as ``.safetensors``.

    Raises:
        CheckpointError: it is no index, or names a file that is not right beside it.
    """
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected a non-empty 'weight_map'")
    by_file: dict[str, set[str]] = {}
    for name, file in cast("dict[str, object]", weight_map).items():
        shard = plain_name(file, f"{path}: {short(repr(name))}", suffix=suffix)
        by_file.setdefault(shard, set()).add(name)
    return by_file


def check_held(index: Path, file: str, held: set[str], listed: set[str]) -> None:
    """Raise unless a file holds the tensors that its index says, and no others.

    Raises:
        CheckpointError: naming one that is missing, or one too many.
    """
    if absent := sorted(listed - held):
        raise CheckpointError(
            f"{index} says that {file!r} holds {short(repr(absent[0]))}, which it does not "
            f"({len(absent)} such names)"
        )
    if extra := sorted(held - listed):
        raise CheckpointError(
            f"{file!r} holds {short(repr(extra[0]))}, which {index} does not list there "
            f"({len(extra)} such names)"
        )


def check_strays(index: Path, listed: Iterable[str], suffix: str) -> None:
    """Raise if a further shard of the same name lies beside an index that does not list it.

    Raises:
        CheckpointError: naming it.
    """
    known = set(listed)
    stems = {_stem(name, suffix) for name in known}
    strays = [
        each.name
        for each in sorted(index.parent.iterdir())
        if each.name not in known
        and is_shard(each.name, suffix)
        and _stem(each.name, suffix) in stems
    ]
    if strays:
        raise CheckpointError(
            f"the shard {short(repr(strays[0]))} is there, but {index} does not list it",
            hint="the index belongs to another save of the model; download or copy both again",
        )


def is_shard(name: str, suffix: str) -> bool:
    """Whether a file is named as one of several, such as ``model-00001-of-00002.safetensors``."""
    return name.endswith(suffix) and _SHARD.search(name.removesuffix(suffix)) is not None


def _stem(name: str, suffix: str) -> str:
    return _SHARD.sub("", name.removesuffix(suffix))


def shard_missing(index: Path, file: str) -> CheckpointError:
    """What to raise where a file that an index names is not there."""
    return CheckpointError(
        f"{index} names the shard {file!r}, which is not there",
        hint="the checkpoint is incomplete; download or copy it again",
    )
