"""Training checkpoints of a run: safetensors and JSON, whole or not there, the last few kept.

A checkpoint is a folder ``step-000100``. It is written beside its place, flushed and renamed, so
that a kill at any moment leaves the earlier ones; the latest is found by looking at what is whole,
not by a file that points to it. Nothing in it is ever unpickled.

    state.json            step, position, what kind of run it is, sizes of the files
    config.yaml           the configuration
    model.safetensors     weights and buffers
    optimizer.safetensors state of the optimizer; its structure is in optimizer.json
    objective.*           what the objective keeps, such as averaged weights
    rank-00000.*          random generators of each rank

Under FSDP2 every rank writes its shards of model, optimizer and objective through
``torch.distributed.checkpoint``, in its safetensors layout: ``shard-00001-...safetensors``.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from surgery.checkpoints import tensorfile
from surgery.checkpoints.swap import replacing, tidy
from surgery.errors import CheckpointError
from surgery.table import human_bytes
from surgery.train.pack import Flat, pack, unpack
from surgery.untrusted.documents import parse, read_bytes
from surgery.untrusted.paths import check_inside, plain_name

FORMAT = 1
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_FULL = {errno.ENOSPC, errno.EDQUOT}

#: Keys of a configuration that may change from one part of a run to the next: none of them moves
#: the weights elsewhere.
FREE = (
    "name",
    "log",
    "checkpoint",
    "evaluate",
    "objective.sample",
    "train.accumulate",
    "train.checkpointing",
    "train.compile",
    "train.device",
    "train.on_nan",
    "train.on_spike",
    "train.spike_factor",
    "train.timeout",
    "train.workers",
)


#: What ``state.json`` says.
_STATE = ("format", "step", "seconds", "ranks", "sharded", "extra", "config", "files")


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Optimizer steps done.
        seconds: Time spent in steps, over all parts of the run.
        ranks: Processes that wrote the checkpoint.
        sharded: Whether the model was sharded over them.
        extra: What else the loop keeps, JSON-able.
    """

    step: int
    seconds: float
    ranks: int
    sharded: bool
    extra: dict[str, Any]


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return checkpoints / f"step-{step:06d}"


def complete(checkpoints: Path) -> list[Path]:
    """Every whole checkpoint, the oldest first."""
    if not checkpoints.is_dir():
        return []
    named = [(match, path) for path in checkpoints.iterdir() if (match := _named(path))]
    named.sort(key=lambda pair: int(pair[0][1]))
    return [path for _, path in named if _is_whole(path)]


def latest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none."""
    found = complete(checkpoints)
    return found[-1] if found else None


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the last ``keep`` whole checkpoints, and what broken saves left."""
    for path in complete(checkpoints)[:-keep]:
        # Renamed first: a kill in the middle must not leave half a checkpoint under its name.
        gone = path.with_name(f".{path.name}.gone")
        path.rename(gone)
    for left in checkpoints.glob(".step-*.gone"):
        shutil.rmtree(left)


@contextmanager
def writing(checkpoints: Path, step: int, need: int) -> Generator[Path]:
    """A folder that becomes the checkpoint of ``step`` when the block ends without an error.

    Args:
        checkpoints: The folder of all checkpoints.
        step: Optimizer steps done.
        need: Bytes that will be written, to say so if they do not fit.

    Raises:
        CheckpointError: the disk is full; earlier checkpoints are as they were.
    """
    target = folder_of(checkpoints, step)
    try:
        check_space(checkpoints, step, need)
        tidy(target)
        with replacing(target, check=lambda _: None) as work:
            yield work
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raised = _full(checkpoints, step, need)
    else:
        return
    raise raised


def write_state(folder: Path, state: object, name: str) -> None:
    """Write nested state as ``name.json`` and ``name.safetensors``."""
    structure, tensors = pack(state, name)
    write_json(folder / f"{name}.json", structure)
    if tensors:
        write_tensors(folder / f"{name}.safetensors", tensors)


def read_state(folder: Path, name: str) -> Any:
    """What ``write_state`` wrote."""
    file = folder / f"{name}.safetensors"
    return unpack(read_json(folder / f"{name}.json"), read_tensors(file) if file.exists() else {})


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file."""
    tensorfile.write(path, list(tensors.items()), lambda _: None)


def read_tensors(path: Path) -> Flat:
    """Read one safetensors file into memory of its own.

    Raises:
        CheckpointError: it is missing, damaged, or a link out of its folder.
    """
    check_inside(path, path.parent)
    return dict(tensorfile.read(path, tensorfile.contents(path)))


def check_tensors(folder: Path) -> None:
    """Check the header of every safetensors file before another reader opens them.

    Raises:
        CheckpointError: one is damaged, or a link out of the folder.
    """
    for path in sorted(folder.glob("*.safetensors")):
        check_inside(path, folder)
        tensorfile.contents(path)


def write_json(path: Path, data: object) -> None:
    """Write JSON and flush it."""
    with path.open("x", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: it is missing, damaged, or a link out of its folder.
    """
    check_inside(path, path.parent)
    return parse(read_bytes(path), str(path), infinities=True)


def seal(folder: Path, progress: Progress, config: Mapping[str, Any]) -> None:
    """Write ``state.json``, the last file: what the checkpoint is, and how large its files are."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    data = {"format": FORMAT, **asdict(progress), "config": dict(config), "files": sizes}
    write_json(folder / STATE, data)


def read_progress(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """How far a checkpoint is, and the configuration it was made with.

    Raises:
        CheckpointError: it is of a newer format, or damaged.
    """
    loaded = read_json(folder / STATE)
    data = cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}
    if data.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{folder} has format {data['format']}, and this version reads {FORMAT}",
            hint="resume with the version of surgery that wrote it",
        )
    missing = [name for name in _STATE if name not in data]
    if missing:
        raise CheckpointError(f"{folder / STATE} is damaged: it has no {missing[0]!r}")
    progress = Progress(
        data["step"], data["seconds"], data["ranks"], data["sharded"], data["extra"]
    )
    return progress, data["config"]


def check_same(folder: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another recipe.

    Raises:
        CheckpointError: the configurations differ in more than what is free; with the keys.
    """
    differing = list(_differences(saved, ours, ""))
    if not differing:
        return
    told = "; ".join(
        f"{key}: {_short(was)} there, {_short(now)} here" for key, was, now in differing
    )
    raise CheckpointError(
        f"{folder} is of another configuration: {told}",
        hint="resume with the configuration of the run (config.yaml in its folder), or start a "
        "new run in another folder",
    )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of dense tensors as they are stored."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _differences(
    saved: Mapping[str, Any], ours: Mapping[str, Any], above: str
) -> Generator[tuple[str, object, object]]:
    for key in dict.fromkeys([*saved, *ours]):
        name = f"{above}{key}"
        was, now = saved.get(key), ours.get(key)
        if was == now or name in FREE:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(
                cast("Mapping[str, Any]", was), cast("Mapping[str, Any]", now), f"{name}."
            )
        else:
            yield name, was, now


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _named(path: Path) -> re.Match[str] | None:
    return _NAME.fullmatch(path.name)


def _is_whole(folder: Path) -> bool:
    """Whether every file is there at its size."""
    try:
        data = read_json(folder / STATE)
        sizes: Mapping[str, int] = data["files"]
        return all(
            (folder / plain_name(name, str(folder))).stat().st_size == size
            for name, size in sizes.items()
        )
    except (OSError, CheckpointError, KeyError, TypeError, AttributeError):
        return False


def check_space(checkpoints: Path, step: int, need: int) -> None:
    """Raise a ``CheckpointError`` unless so many bytes are free.

    Args:
        checkpoints: The folder of all checkpoints; created.
        step: The step that is to be saved.
        need: Bytes.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(checkpoints).free < need:
        raise _full(checkpoints, step, need)


def _full(checkpoints: Path, step: int, need: int) -> CheckpointError:
    free = shutil.disk_usage(checkpoints).free
    last = latest(checkpoints)
    kept = "there is no earlier one" if last is None else f"{last.name} is whole"
    return CheckpointError(
        f"no room for the checkpoint of step {step} in {checkpoints}: it needs "
        f"{human_bytes(need)}, and {human_bytes(free)} are free; {kept}",
        hint="free some space, or lower checkpoint.keep, then resume",
    )


def existing_steps(paths: Sequence[Path]) -> list[int]:
    """The steps of checkpoints, from their names."""
    return [int(match[1]) for path in paths if (match := _named(path))]
