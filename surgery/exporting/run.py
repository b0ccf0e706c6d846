"""``surgery.export``: choose the format, write beside the target, verify, put in place."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from surgery import files, progress
from surgery.capture.graft import stock_class
from surgery.checkpoints import base_weights, manifest
from surgery.checkpoints.inventory import take
from surgery.checkpoints.swap import replacing
from surgery.copies import is_sharded, sharing
from surgery.errors import ExportError, RuleError, SourceError
from surgery.exporting import provenance
from surgery.exporting.agreement import Agreement, outputs
from surgery.exporting.base import Format
from surgery.exporting.provenance import Provenance
from surgery.preflight import preflight
from surgery.record import added_names, record_of
from surgery.registry import FORMATS, suggest
from surgery.sources import Example, describe, infer_example
from surgery.table import human_bytes, render
from surgery.tree import named_parameters
from surgery.verification.outputs import not_finite

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Exported:
    """What ``surgery.export`` wrote. ``print(exported)`` shows it as a table.

    Attributes:
        path: The file or folder.
        format: Name of the format.
        files: Name → size in bytes of each file.
        agreement: How far its outputs are from the model's.
    """

    path: Path
    format: str
    files: Mapping[str, int]
    agreement: Agreement

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "path": str(self.path),
            "format": self.format,
            "files": dict(self.files),
            "agreement": self.agreement.to_dict(),
        }

    def view(self) -> Table:
        """As a table for a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False)
        table.add_row("format", Text(self.format))
        table.add_row("path", Text(str(self.path)))
        for name, size in self.files.items():
            table.add_row("file", Text(f"{name}  {human_bytes(size)}"))
        table.add_row("checked by", Text(self.agreement.consumer))
        table.add_row("calls", Text(", ".join(self.agreement.calls)))
        deviation = f"{self.agreement.deviation:.1e} (bound {self.agreement.bound:.0e})"
        table.add_row("largest deviation", Text(deviation))
        return table

    def __str__(self) -> str:
        return render(self.view())


@dataclass(frozen=True)
class Fit:
    """Whether a format can hold a model.

    Attributes:
        format: Name of the format.
        misfit: The reason why it cannot, or None.
    """

    format: str
    misfit: str | None


def export(
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    format: str,  # noqa: A002 - the word for it
    example: object = None,
    **options: Any,
) -> Exported:
    """Write a model in a format that others read without this library, and verify it.

    What was written is loaded with the program it is for and its outputs are compared with the
    model's before it takes its place: an export that computes something else is never left
    behind. ``surgery.json`` in the folder, or ``model.onnx.surgery.json`` beside the file, says of
    which recipes, versions and tensors it was made. The model itself is not changed; what is
    exported is its forward in eval mode.

    Args:
        model: A model with or without rewrites.
        out: A folder to create, or to replace if an export wrote everything in it; or a file,
            likewise, where the format can be one and ``out`` has its suffix, such as
            ``model.onnx``.
        format: Name of the format; ``surgery list formats`` lists them.
        example: A call of the model: a tensor, a tuple (args), a dict (kwargs) or a
            ``surgery.Example``; inferred for models of timm, transformers and diffusers.
        **options: Options of the format.

    Returns:
        Where it is, what it consists of, and how far its outputs are from the model's.

    Raises:
        ExportError: an unknown format or option; the format cannot hold the model, which has
            weights without values or returns NaN; no example; a missing package; the outputs
            differ; the target holds something else.
        ModelStateError: the model is compiled, wrapped, or a part of a rewritten model.
    """
    writer = _format(format, options)
    preflight(model)
    _check_values(model)
    reason = writer.misfit(model)
    if reason is not None:
        raise ExportError(
            f"{stock_class(model).__name__} does not fit the format {format!r}: {reason}",
            hint="surgery export --list MODEL says which formats fit",
        )
    target = Path(out)
    if _is_file_target(writer, target):
        _check_file_target(target)
    call = _example(model, example)
    source = sharing(model).eval()
    _check_outputs(source, call)
    if _is_file_target(writer, target):
        return _to_file(writer, source, call, target)
    return _to_folder(writer, source, call, target)


def fits(model: nn.Module) -> list[Fit]:
    """Which formats can hold a model, and why the others cannot.

    Args:
        model: A model with or without rewrites, which may lie on the meta device.
    """
    return [Fit(name, _misfit(name, model)) for name in FORMATS.names()]


def _misfit(name: str, model: nn.Module) -> str | None:
    try:
        return _format(name, {}).misfit(model)
    except ImportError as error:
        return f"it cannot be imported: {error}"


def _format(name: str, options: Mapping[str, Any]) -> Format:
    if name not in FORMATS.names():
        raise ExportError(
            f"unknown format {name!r}",
            hint=suggest(name, FORMATS.names()),
        )
    try:
        return FORMATS.get(name)(**options)
    except RuleError as error:
        raise ExportError(f"format {name!r}: {error.message}", hint=error.hint) from None


def _check_values(model: nn.Module) -> None:
    for name, parameter in named_parameters(model):
        if parameter.device.type == "meta":
            raise ExportError(
                f"{name} is on the meta device and has no values to export",
                hint="load the weights first",
            )
        if is_sharded(parameter):
            raise ExportError(
                f"{name} is sharded over processes (DTensor)",
                hint="gather it first, for example with FSDP2's full state dict",
            )


def _example(model: nn.Module, given: object) -> Example:
    try:
        return infer_example(model) if given is None else Example.coerce(given)
    except SourceError as error:
        raise ExportError(
            f"an example call is needed: {error.message}",
            hint=error.hint or "pass example=..., or --example FILE on the command line",
        ) from None


def _check_outputs(model: nn.Module, call: Example) -> None:
    for path, tensor in outputs(model, call).items():
        wrong = not_finite(tensor, nan_only=True)
        if wrong is not None:
            count, first = wrong
            raise ExportError(
                f"the model returns NaN for the example: {count} values of {path}, first {first}; "
                "no export of it could be verified",
                hint="pass another example, or look for the NaN: surgery.verify(model)",
            )


def _is_file_target(writer: Format, target: Path) -> bool:
    return (
        writer.file is not None
        and target.suffix == Path(writer.file).suffix
        and not target.is_dir()
    )


def _check_file_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_file():
        raise ExportError(f"{target} is neither a file nor a folder")
    told = provenance.beside(target)
    if not told.exists():
        raise ExportError(
            f"{target} is there already, and no {told.name} beside it says that an export wrote it",
            hint="move it away, or export to another name",
        )


def _to_folder(writer: Format, model: nn.Module, call: Example, target: Path) -> Exported:
    with replacing(target, provenance.check_replaceable) as work:
        found = _written(writer, model, call, work)
        entries = provenance.files_of(work)
        provenance.write(work, _provenance(writer, model, entries, found))
    sizes = {name: file.bytes for name, file in entries.items()}
    return Exported(target, writer.name, sizes, found)


def _to_file(writer: Format, model: nn.Module, call: Example, target: Path) -> Exported:
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        work = Path(folder)
        found = _written(writer, model, call, work)
        single = work / str(writer.file)
        others = sorted(each.name for each in work.iterdir() if each != single)
        if others:
            raise ExportError(
                f"the export is more than one file: {', '.join(others)} beside {single.name}",
                hint=f"give a folder: {target.with_suffix('')}",
            )
        entry = provenance.file_of(single)
        told = _provenance(writer, model, {target.name: entry}, found)
        # First: a kill in between leaves a file that the next export may replace.
        files.write(provenance.beside(target), provenance.dump(told))
        with files.beside(target) as place:
            single.replace(place)
    return Exported(target, writer.name, {target.name: entry.bytes}, found)


def _written(writer: Format, model: nn.Module, call: Example, work: Path) -> Agreement:
    with progress.task(f"writing {writer.name}"):
        writer.write(model, work, call)
    with progress.task(f"checking {writer.name}"):
        found = writer.check(model, work, call)
    found.check()
    return found


def _provenance(
    writer: Format, model: nn.Module, entries: dict[str, provenance.File], found: Agreement
) -> Provenance:
    cls = stock_class(model)
    record = record_of(model)
    operations = [] if record is None else record.operations
    held = take(model)
    added = added_names(model)
    return Provenance(
        export=writer.name,
        options=_options(writer),
        versions={**manifest.versions(cls), **writer.versions()},
        model_class=f"{cls.__module__}.{cls.__qualname__}",
        source=describe(model),
        recipes=[operation.recipe for operation in operations],
        tensors=base_weights.digests(held.state),
        files=entries,
        agreement=found.to_dict(),
        added={name: added[name] for name in held.state if name in added},
        ties={alias: name for alias, name in held.ties.items() if name in held.state},
    )


def _options(writer: Format) -> dict[str, Any]:
    data = dataclasses.asdict(writer) if dataclasses.is_dataclass(writer) else {}
    return json.loads(json.dumps(data))
