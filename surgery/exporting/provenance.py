"""``surgery.json`` of an export: what it was made of, by which versions, and what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from surgery.checkpoints.manifest import checksum
from surgery.errors import CheckpointError, ExportError
from surgery.files import sha256_of
from surgery.table import some
from surgery.untrusted.documents import parse_object, read_bytes, read_object
from surgery.untrusted.paths import check_inside, plain_name, short

FORMAT = 1
NAME = "surgery.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class File(_Part):
    """One file of the export."""

    bytes: NonNegativeInt
    sha256: Sha256


class Provenance(_Part):
    """Everything an export says about itself.

    Attributes:
        format: Version of this layout.
        kind: ``export``; a folder of ``surgery.save`` says ``model`` or ``adapter``.
        export: Name of the export format.
        options: The options it was written with.
        versions: Versions of this library, of torch and of the packages involved.
        model_class: Dotted name of the model's stock class.
        source: How to rebuild the stock model; None for a class of the user's own.
        recipes: Every recipe that was applied, in order.
        tensors: SHA-256 of each tensor of the model that was exported (dtype, shape, bytes).
        files: Every other file of the folder.
        agreement: How far the export's outputs were from the model's.
        added: Those of the tensors that rewrites added → id of the rule that did.
        ties: Further names of a tensor → its name in ``tensors``.
        origin: Of what was converted from files: those files.
    """

    format: Literal[1] = FORMAT
    kind: Literal["export"] = "export"
    export: str
    options: dict[str, Any]
    versions: dict[str, str]
    model_class: str
    source: dict[str, Any] | None
    recipes: list[dict[str, Any]]
    tensors: dict[str, Sha256]
    files: dict[str, File]
    agreement: dict[str, Any]
    added: dict[str, str] = {}
    ties: dict[str, str] = {}
    origin: dict[str, File] = {}


def files_of(folder: Path) -> dict[str, File]:
    """Size and SHA-256 of every file of a folder but ``surgery.json``."""
    return {path.name: file_of(path) for path in sorted(folder.iterdir()) if path.name != NAME}


def beside(file: Path) -> Path:
    """Where the provenance of an export that is one file lies."""
    return file.with_name(f"{file.name}.{NAME}")


def file_of(path: Path) -> File:
    """Size and SHA-256 of a file."""
    return File(bytes=path.stat().st_size, sha256=sha256_of(path))


def dump(provenance: Provenance) -> str:
    """The text of ``surgery.json``; the last field is a checksum of all others."""
    data = provenance.model_dump(mode="json")
    data["checksum"] = checksum(data)
    return json.dumps(data, indent=1) + "\n"


def write(folder: Path, provenance: Provenance) -> None:
    """Write ``surgery.json``."""
    (folder / NAME).write_text(dump(provenance), encoding="utf-8")


def read(place: Path) -> Provenance:
    """The provenance of an export.

    Args:
        place: Its folder, or its one file.

    Raises:
        ExportError: there is none, it was changed after it was written, is a link out of its
            folder, or names a file that is not right beside it.
    """
    path = beside(place) if place.is_file() else place / NAME
    if not path.exists() and not path.is_symlink():
        raise ExportError(f"there is no {path}, so surgery.export did not write it")
    check_inside(path, path.parent, error=ExportError)
    text = read_bytes(path, error=ExportError)
    fields = parse_object(text, f"{path} is damaged", error=ExportError, infinities=True)
    if fields.get("kind") != "export":
        raise ExportError(f"{path} is not that of an export")
    if fields.pop("checksum", None) != checksum(fields):
        raise ExportError(f"{path} was changed after it was written: its checksum does not fit")
    try:
        told = Provenance.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ExportError(f"{path} is damaged: {short(where)}: {first['msg']}") from None
    for name in (*told.files, *told.origin):
        plain_name(name, str(path), error=ExportError)
    return told


def is_export(folder: Path) -> bool:
    """Whether a folder says that it is an export. Nothing else in it is looked at."""
    try:
        return read_object(folder / NAME, infinities=True).get("kind") == "export"
    except CheckpointError:
        return False


def check_replaceable(folder: Path) -> None:
    """Raise unless everything in a folder was written by an export.

    Raises:
        ExportError: it holds something else, which replacing the folder would delete.
    """
    present = {each.name for each in folder.iterdir()}
    try:
        known = {NAME, *read(folder).files}
    except ExportError as error:
        raise ExportError(
            f"{folder} holds {some(sorted(present), 4)} and no export: {error.message}",
            hint="export to a new or an empty folder",
        ) from None
    foreign = present - known
    if foreign:
        raise ExportError(
            f"{folder} holds {some(sorted(foreign), 4)} besides an export, which exporting to it "
            "again would delete",
            hint="move it away, or export to another folder",
        )
