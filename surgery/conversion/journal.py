"""What of a conversion is finished, kept beside the output so that a killed one can go on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from surgery.checkpoints.swap import unfinished
from surgery.files import sha256_of

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Finished:
    """A file that is written, flushed and hashed.

    Attributes:
        bytes: Its size.
        sha256: Its hash.
        not_finite: Tensor → how many of its values are NaN or infinite.
        notes: What whoever made its tensors wants back when the conversion goes on.
    """

    bytes: int
    sha256: str
    not_finite: Mapping[str, int] = field(default_factory=dict[str, int])
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Journal:
    """One line of JSON for each finished file, behind one that says what is converted.

    Lines are flushed to the disk one by one; the last may be cut off by a kill and is left out
    then. A journal of another conversion, or of a source that changed, is begun anew.

    Args:
        target: The folder that is converted to.
        job: Everything that decides what is written, as JSON-able data.
    """

    def __init__(self, target: Path, job: Mapping[str, Any]) -> None:
        work = unfinished(target)
        self.path = work.with_name(f"{work.name}.jsonl")
        self._first = {"format": FORMAT, "job": json.loads(json.dumps(job))}
        self.finished: dict[str, Finished] = {}
        self.hashed: dict[str, str] = {}

    def open(self, work: Path) -> None:
        """Read what there is, keep of ``work`` what is finished and whole, remove the rest.

        Args:
            work: The folder that the files are written in.
        """
        lines = self._lines()
        if lines and lines[0] == self._first:
            self._take(lines[1:])
        elif lines:
            logger.warning("%s is of another conversion, which is given up", self.path)
        for name, entry in list(self.finished.items()):
            if not _is_whole(work / name, entry):
                del self.finished[name]
        for each in work.iterdir():
            if each.name not in self.finished:
                each.unlink()
        self._write_anew()

    def finish(self, name: str, entry: Finished) -> None:
        """Note that a file is finished."""
        self.finished[name] = entry
        self._append(_line(name, entry))

    def hash_of_source(self, name: str, digest: str) -> None:
        """Note the hash of a file of the source."""
        self.hashed[name] = digest
        self._append({"source": name, "sha256": digest})

    def remove(self) -> None:
        """The conversion is done."""
        self.path.unlink(missing_ok=True)

    def _take(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if "source" in line:
                self.hashed[line["source"]] = line["sha256"]
            else:
                fields = {key: value for key, value in line.items() if key != "file"}
                self.finished[line["file"]] = Finished(**fields)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        found: list[dict[str, Any]] = []
        for text in self.path.read_bytes().splitlines():
            try:
                found.append(cast("dict[str, Any]", json.loads(text)))
            except ValueError:
                break  # cut off by a kill, and nothing follows
        return found

    def _write_anew(self) -> None:
        lines = [self._first, *(_line(name, entry) for name, entry in self.finished.items())]
        lines += [{"source": name, "sha256": digest} for name, digest in self.hashed.items()]
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        new.replace(self.path)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _line(name: str, entry: Finished) -> dict[str, Any]:
    return {
        "file": name,
        "bytes": entry.bytes,
        "sha256": entry.sha256,
        "not_finite": dict(entry.not_finite),
        "notes": dict(entry.notes),
    }


def _is_whole(path: Path, entry: Finished) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.bytes:
        return False
    return sha256_of(path) == entry.sha256
