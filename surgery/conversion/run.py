"""``surgery.convert``: a checkpoint of any size rewritten, merged, cast or cut, as a stream."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery import progress
from surgery.checkpoints import manifest
from surgery.checkpoints.inventory import places, take
from surgery.checkpoints.manifest import FileEntry
from surgery.checkpoints.names import keymap
from surgery.checkpoints.saving import size_of
from surgery.checkpoints.sharded import Checkpoint, open_checkpoint
from surgery.checkpoints.swap import continuing
from surgery.conversion.engine import Engine
from surgery.conversion.hub import Hub
from surgery.conversion.journal import Journal
from surgery.conversion.merges import changes_of
from surgery.conversion.output import Output
from surgery.conversion.quantised import Quantised
from surgery.conversion.saved import Saved
from surgery.conversion.stock import Changes, Stock
from surgery.errors import CheckpointError
from surgery.files import sha256_of
from surgery.planning import RecipeLike, as_recipe, plan
from surgery.rules import Recipe
from surgery.sources import skeleton
from surgery.sources.request import as_dtype
from surgery.table import human_bytes, render
from surgery.untrusted.documents import read_object

if TYPE_CHECKING:
    from rich.table import Table

_DEFAULT_SHARD = "5GB"
_CONFIG = "config.json"
_SHOWN = 5


@dataclass(frozen=True)
class Converted:
    """What ``surgery.convert`` wrote. ``print(converted)`` shows it as a table.

    Attributes:
        path: The folder.
        kind: ``saved model``, which ``surgery.restore`` reads, or ``stock model``, which
            ``from_pretrained`` of its library reads.
        files: Name → size in bytes of each file.
        resumed: Bytes that an earlier, interrupted run had written already.
        seconds: Stage → time. ``write``, ``flush`` and ``hash`` add up what all threads spent;
            ``total`` is the time that passed.
        not_finite: Tensor → how many of its values are NaN or infinite.
    """

    path: Path
    kind: str
    files: Mapping[str, int]
    resumed: int
    seconds: Mapping[str, float]
    not_finite: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "files": dict(self.files),
            "resumed": self.resumed,
            "seconds": {stage: round(spent, 3) for stage, spent in self.seconds.items()},
            "not_finite": dict(self.not_finite),
        }

    def view(self) -> Table:
        """As a table for a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False)
        table.add_row("kind", Text(self.kind))
        table.add_row("path", Text(str(self.path)))
        table.add_row("files", Text(f"{len(self.files)}, {human_bytes(sum(self.files.values()))}"))
        if self.resumed:
            table.add_row("done before", Text(human_bytes(self.resumed)))
        spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        table.add_row("time", Text(spent))
        for name, count in list(self.not_finite.items())[:_SHOWN]:
            table.add_row("NaN or infinite", Text(f"{count} values of {name}", style="yellow"))
        if len(self.not_finite) > _SHOWN:
            table.add_row("", Text(f"and {len(self.not_finite) - _SHOWN} more tensors"))
        return table

    def __str__(self) -> str:
        return render(self.view())


def convert(
    src: str | os.PathLike[str],
    rules: RecipeLike | None,
    out: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    threads: int | None = None,
    allow_other_base: bool = False,
    example: Any = None,
) -> Converted:
    """Rewrite a checkpoint of any size without loading it.

    The model is built without weights, the rules are planned and applied to that, and the weights
    are streamed from folder to folder: copied in the kernel where they stay as they are, a few
    rows at a time where adapters are merged or values are cast, one tensor at a time where a
    method decomposes it.

    With rules the result is the folder that ``surgery.save`` would have written of the loaded and
    rewritten model, with the same values bit for bit; ``surgery.restore`` reads it. Without rules
    it is a folder of the stock architecture, which ``from_pretrained`` reads.

    A conversion that was killed goes on where it stopped when the same call is made again. The
    source is only read, and must not change meanwhile. ``out`` is put in place whole.

    Args:
        src: A folder in the hub's layout: ``config.json``, and safetensors with their index.
        rules: A recipe, or None to leave the architecture as it is.
        out: Created, or replaced if a conversion wrote everything in it.
        adapter: A folder of PEFT, or one of ``surgery.save(..., adapter_only=True)``, that is
            merged into the weights first: ``W + scaling · B A``, formed in float32 and rounded
            once.
        dtype: What floating weights are cast to, such as "bfloat16".
        max_shard_size: Most bytes per file, such as "5GB". By default "5GB" with rules, and the
            files of the source without.
        threads: How many tensors are worked on at a time; by default as many as there are cores.
        allow_other_base: Merge an adapter that was saved beside other weights.
        example: A call of the model, for rules that must see the forward run.

    Raises:
        CheckpointError: the source is damaged, unsafe, or changed meanwhile; it does not fit its
            configuration; a weight to be merged into is quantised; the adapter does not fit; the
            disk has too little space. Nothing is put in the place of ``out`` then.
        SourceError: the architecture is not known.
        RuleError, NoMatch, Conflict: as ``surgery.plan`` raises them.
    """
    begun = time.perf_counter()
    source, target = Path(src), Path(out)
    _check_places(source, target)
    recipe = None if rules is None else as_recipe(rules)
    if recipe is None and adapter is None and dtype is None and max_shard_size is None:
        raise CheckpointError(
            "there is nothing to convert: no rules, no adapter, no dtype and no max_shard_size"
        )
    count = _threads(threads)
    checkpoint = open_checkpoint(source)
    wanted = as_dtype(dtype)
    folder = None if adapter is None else Path(adapter)
    with progress.task("planning"):
        stock, model = _stock(checkpoint, wanted, folder, allow_other_base=allow_other_base)
    told = _told(recipe, folder, wanted, max_shard_size)
    output: Output
    if recipe is None:
        limit = None if max_shard_size is None else size_of(max_shard_size)
        output = Hub(model, stock, dtype=wanted, limit=limit, told=told)
    else:
        _refuse_quantised(stock)
        with progress.task("planning"):
            _rewrite(model, recipe, example)
        output = Saved(model, stock, size_of(max_shard_size or _DEFAULT_SHARD))
    journal = Journal(target, _identity(checkpoint, model, output, told))
    with continuing(target, output.check_replaceable) as work:
        journal.open(work)
        resumed = sum(entry.bytes for entry in journal.finished.values())
        for entry in journal.finished.values():
            output.resume(entry.notes)
        engine = Engine(checkpoint, work, journal, notes=output.notes, threads=count)
        engine.run(output.files, output.jobs)
        origin = _hashed(checkpoint, journal, count, engine.seconds)
        output.finish(work, journal.finished, origin)
        checkpoint.check_unchanged()
        files = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
    journal.remove()
    bad = {n: c for entry in journal.finished.values() for n, c in entry.not_finite.items()}
    seconds = {**engine.seconds, "total": time.perf_counter() - begun}
    return Converted(target, output.kind, files, resumed, seconds, bad)


def _check_places(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder, expected one that holds a checkpoint")
    here, there = source.resolve(), target.resolve()
    if there == here or here in there.parents or there in here.parents:
        raise CheckpointError(
            f"the source {source} and the output {target} lie in one another",
            hint="give a folder beside the source",
        )


def _threads(given: int | None) -> int:
    if given is None:
        return os.cpu_count() or 1
    if given < 1:
        raise CheckpointError(f"threads is {given}, expected at least 1")
    return given


def _stock(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    adapter: Path | None,
    *,
    allow_other_base: bool,
) -> tuple[Stock, nn.Module]:
    """The stock tensors, everything about them checked, and the model without its weights."""
    config = checkpoint.folder / _CONFIG
    if not config.is_file():
        raise CheckpointError(
            f"{checkpoint.folder} has no {_CONFIG}",
            hint="expected a folder as written by save_pretrained; what surgery.save wrote is "
            "read by surgery.restore",
        )
    declared = bool(read_object(config, infinities=True).get("quantization_config"))

    def built(dtype: torch.dtype | None) -> nn.Module:
        return skeleton(checkpoint.folder, dtype=dtype, stored_dtype=_stored_dtype(checkpoint))

    model = built(dtype)
    names = keymap(model, checkpoint)
    quantised = Quantised(checkpoint, declared=declared)
    like = take(model).state
    stock = Stock(checkpoint, names, like, Changes(), quantised)
    if adapter is not None:
        stock.check()
        # Another model: what adapters leave in the one they are put into is no concern then. It has
        # the dtypes in which the checkpoint loads, not those of the result: adapters were trained
        # beside the former.
        changes = changes_of(
            built(None),
            adapter,
            stock.stored,
            allow_other_base=allow_other_base,
            dtype=dtype,
        )
        stock = Stock(checkpoint, names, like, changes, quantised)
    stock.check()
    return stock, model


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    dtypes = (located.slot.dtype for located in checkpoint.tensors.values())
    return next((each for each in dtypes if each.is_floating_point and each.itemsize > 1), None)


def _refuse_quantised(stock: Stock) -> None:
    if stock.quantised:
        raise CheckpointError(
            f"{stock.names.label} is quantised, and a saved rewrite is rebuilt by its library as "
            "the unquantised model",
            hint="convert the unquantised checkpoint; or load the quantised model, apply the "
            "recipe, and surgery.save(model, folder, adapter_only=True)",
        )


def _rewrite(model: nn.Module, recipe: Recipe, example: Any) -> None:
    """Plan and apply with everything on the meta device; buffers get their values back."""
    aside: list[tuple[Any, Tensor, Tensor]] = []
    for _, place in places(model):
        if not place.tensor.is_meta:
            held = place.tensor
            place.put(held.to("meta"))
            aside.append((place, place.tensor, held))
    plan(model, recipe, example=example).apply()
    for place, stand_in, held in aside:
        if place.tensor is stand_in:
            place.put(held)


def _told(
    recipe: Recipe | None,
    adapter: Path | None,
    dtype: torch.dtype | None,
    max_shard_size: int | str | None,
) -> dict[str, Any]:
    """The options, as ``surgery.json`` and the journal tell them."""
    return {
        "recipe": None if recipe is None else recipe.dump(),
        "adapter": None if adapter is None else _digests(adapter),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "max_shard_size": max_shard_size,
    }


def _digests(folder: Path) -> dict[str, str]:
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    return {path.name: sha256_of(path) for path in files if path.is_file()}


def _identity(
    checkpoint: Checkpoint, model: nn.Module, output: Output, told: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that decides what is written."""
    return {
        "source": {path.name: _stamp(path) for path in _read_files(checkpoint)},
        "folder": str(checkpoint.folder.resolve()),
        "options": dict(told),
        "versions": manifest.versions(type(model)),
        "files": {file.name: sha256(file.header).hexdigest() for file in output.files},
    }


def _read_files(checkpoint: Checkpoint) -> Iterable[Path]:
    index = () if checkpoint.index is None else (checkpoint.index,)
    return (*checkpoint.files, *index, checkpoint.folder / _CONFIG)


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def _hashed(
    checkpoint: Checkpoint, journal: Journal, threads: int, seconds: dict[str, float]
) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file of the source."""
    files = list(_read_files(checkpoint))
    missing = [path for path in files if path.name not in journal.hashed]
    begun = time.perf_counter()
    total = sum(path.stat().st_size for path in missing)
    with (
        progress.task("hashing the source", total, "bytes") as task,
        ThreadPoolExecutor(threads) as pool,
    ):
        for path, digest in zip(missing, pool.map(sha256_of, missing), strict=True):
            journal.hash_of_source(path.name, digest)
            task.advance(path.stat().st_size)
    seconds["hash source"] = time.perf_counter() - begun
    return {
        path.name: FileEntry(bytes=path.stat().st_size, sha256=journal.hashed[path.name])
        for path in files
    }
