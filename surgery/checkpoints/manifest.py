"""``surgery.json``: what a saved folder holds, checked before anything in it is used."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from surgery import progress
from surgery.errors import CheckpointError
from surgery.files import sha256_of
from surgery.table import some
from surgery.untrusted.documents import parse_object, read_bytes
from surgery.untrusted.paths import check_inside, short
from surgery.version import __version__

FORMAT = 1
NAME = "surgery.json"
_LIBRARIES = ("timm", "transformers", "diffusers")
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_MAX_BYTES = 1 << 30
_CHUNK = 1 << 22
#: A plain name in this folder, of a kind that is written: no separators, no leading dot.
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.(safetensors|json|yaml)")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Part):
    """One file beside ``surgery.json``."""

    bytes: NonNegativeInt
    sha256: Sha256


class TensorEntry(_Part):
    """One tensor: the file it lies in and what it must look like there.

    ``stride`` is given where the tensor was dense but not in C order, such as channels last.
    """

    file: str
    dtype: str
    shape: list[NonNegativeInt]
    stride: list[NonNegativeInt] | None = None


class Base(_Part):
    """The stock weights an adapter belongs to: SHA-256 of each tensor by name."""

    tensors: dict[str, Sha256]


class Manifest(_Part):
    """Everything ``surgery.json`` says.

    Attributes:
        format: Version of this layout.
        kind: A whole model, or the inserted tensors only.
        versions: Version of this library, of torch and of the model's library.
        model_class: Dotted name of the root's stock class, for messages.
        source: How to rebuild the model, from ``sources.describe``; None for a class of the
            user's own.
        generation: The generation config of a transformers model that generates.
        files: Every other file of the folder.
        state: Parameters and persistent buffers.
        transient: Buffers that no state dict holds.
        kept: Copies of stock tensors that undo needs, as ``<operation>/<name>``.
        ties: Other names of one tensor → the name it is stored under.
        trainable: Names of the parameters that require gradients.
        training: The root's training flag.
        otherwise: Paths of the modules whose training flag differs from the root's.
        record: The edit log.
        base: Only for an adapter.
        origin: Only for a folder of ``surgery.convert``: the files it was made of.
    """

    format: Literal[1] = FORMAT
    kind: Literal["model", "adapter"]
    versions: dict[str, str]
    model_class: str
    source: dict[str, Any] | None
    generation: dict[str, Any] | None = None
    files: dict[str, FileEntry]
    state: dict[str, TensorEntry]
    transient: dict[str, TensorEntry] = {}
    kept: dict[str, TensorEntry] = {}
    ties: dict[str, str] = {}
    trainable: list[str]
    training: bool
    otherwise: list[str] = []
    record: dict[str, Any] | None
    base: Base | None = None
    origin: dict[str, FileEntry] | None = None


def versions(cls: type) -> dict[str, str]:
    """What a model of a class was written with: this library, torch and the model's library."""
    found = {"surgery": __version__, "torch": str(torch.__version__)}
    library = cls.__module__.partition(".")[0]
    if library in _LIBRARIES:
        found[library] = version(library)
    return found


def dump(manifest: Manifest) -> str:
    """The text of ``surgery.json``; the last field is a checksum of all others."""
    data = manifest.model_dump(mode="json", exclude_defaults=True)
    data = {"format": manifest.format, **data}
    data["checksum"] = checksum(data)
    return json.dumps(data, indent=1) + "\n"


def read(folder: Path) -> Manifest:
    """Read and check a folder's ``surgery.json``; the other files are not opened.

    Raises:
        CheckpointError: the folder was not written by ``save``, is of a newer format, or its
            ``surgery.json`` was damaged or changed.
    """
    path = folder / NAME
    check_inside(path, folder)
    if not path.is_file():
        raise _not_ours(folder)
    data = _parse(path)
    if data.get("kind") == "export":
        raise CheckpointError(
            f"{folder} is an export in the format {data.get('export')!r}, not a saved model",
            hint="load it with the program that format is for, or export the saved model again",
        )
    _check_format(path, data)
    told = data.pop("checksum", None)
    if told != checksum(data):
        raise CheckpointError(
            f"{path} was changed after it was written: its checksum does not fit",
            hint="restore the file from a copy, or save the model again",
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = short(".".join(map(str, first["loc"])))
        raise CheckpointError(f"{path} is damaged: {where}: {first['msg']}") from None
    _check_names(path, manifest)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare size and SHA-256 of every listed file with what was written.

    Raises:
        CheckpointError: a file is missing, truncated, or holds other bytes.
    """
    for name, entry in manifest.files.items():
        _check_size(folder / name, entry)
    total = sum(entry.bytes for entry in manifest.files.values())
    with progress.task("checking files", total, "bytes") as task:
        for name, entry in manifest.files.items():
            if sha256_of(folder / name, task.advance) != entry.sha256:
                raise CheckpointError(
                    f"{folder / name} is corrupted: its SHA-256 is not the one that was written",
                    hint="copy the folder again, or save the model again",
                )


def check_replaceable(folder: Path) -> None:
    """Raise unless everything in a folder was written by ``save``.

    Raises:
        CheckpointError: it holds something else, which replacing the folder would delete.
    """
    present = {each.name for each in folder.iterdir()}
    if NAME not in present:
        raise CheckpointError(
            f"{folder} holds {some(sorted(present), 4, cut=short)} and was not written by "
            "surgery.save",
            hint="save to a new or an empty folder",
        )
    foreign = present - {NAME, *read(folder).files}
    if foreign:
        raise CheckpointError(
            f"{folder} holds {some(sorted(foreign), 4, cut=short)} besides the saved model, which "
            "saving to it again would delete",
            hint="move it away, or save to another folder",
        )


def _not_ours(folder: Path) -> CheckpointError:
    if not folder.exists():
        return CheckpointError(f"{folder} does not exist, expected a folder that save wrote")
    if not folder.is_dir():
        return CheckpointError(f"{folder} is a file, expected a folder that save wrote")
    pickles = sorted(each.name for each in folder.iterdir() if each.suffix in _PICKLES)
    if pickles:
        return CheckpointError(
            f"{folder} holds the pickle {pickles[0]} and no {NAME}: pickles can run code and are "
            "never opened here",
            hint="load the model with its own library, then surgery.save it",
        )
    return CheckpointError(
        f"{folder} has no {NAME}, expected a folder that surgery.save wrote",
        hint="surgery.load reads the folders of timm, transformers and diffusers",
    )


def _parse(path: Path) -> dict[str, Any]:
    # Infinities may stand in the configuration of a model.
    data = read_bytes(path, limit=_MAX_BYTES)
    return parse_object(data, f"{path} is damaged", infinities=True)


def _check_format(path: Path, data: dict[str, Any]) -> None:
    version = data.get("format")
    if not isinstance(version, int):
        raise CheckpointError(
            f"{path} is damaged: its format is {short(repr(version))}, expected a number"
        )
    if version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}; this version of surgery reads up to {FORMAT}",
            hint="install a newer version of model-surgery",
        )


def _check_names(path: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        told = short(repr(name))
        if Path(name).suffix in _PICKLES:
            raise CheckpointError(f"{path} lists the pickle {told}: pickles are never opened")
        if not _FILE.fullmatch(name) or name == NAME:
            raise CheckpointError(f"{path} lists {told}, which is no plain file name")
    for section in (manifest.state, manifest.transient, manifest.kept):
        for name, entry in section.items():
            if entry.file not in manifest.files:
                raise CheckpointError(
                    f"{path}: {short(repr(name))} is said to lie in {short(repr(entry.file))}, "
                    "which is not listed"
                )
    for alias, name in manifest.ties.items():
        if name not in manifest.state and name not in manifest.transient:
            raise CheckpointError(
                f"{path}: {short(repr(alias))} is tied to {short(repr(name))}, which is not listed"
            )


def _check_size(path: Path, entry: FileEntry) -> None:
    check_inside(path, path.parent)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing", hint="copy the folder again; surgery.json lists all its files"
        )
    size = path.stat().st_size
    if size < entry.bytes:
        raise CheckpointError(f"{path} is truncated: {size} of {entry.bytes} bytes")
    if size > entry.bytes:
        raise CheckpointError(f"{path} is corrupted: {size} bytes, {entry.bytes} were written")


def checksum(data: Mapping[str, Any]) -> str:
    """SHA-256 of JSON-able data in one canonical spelling."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode(errors="surrogatepass")).hexdigest()


def write(folder: Path, manifest: Manifest) -> None:
    """Write ``surgery.json``; it must be the last file written."""
    with (folder / NAME).open("x", encoding="utf-8") as file:
        file.write(dump(manifest))
        file.flush()
        os.fsync(file.fileno())
