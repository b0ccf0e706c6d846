"""What every kind of converted folder is: files to write, jobs that write them, and an end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.checkpoints.manifest import FileEntry
from surgery.conversion.jobs import Job
from surgery.conversion.journal import Finished
from surgery.conversion.layout import OutFile


class Output(ABC):
    """One folder to be written.

    Attributes:
        kind: What reads it, in a word.
        files: The files that hold tensors.
        jobs: What writes them.
    """

    kind: str
    files: Sequence[OutFile]
    jobs: Sequence[Job]

    @abstractmethod
    def check_replaceable(self, folder: Path) -> None:
        """Raise unless an existing folder may be replaced by this one."""

    def notes(self, file: OutFile) -> Mapping[str, Any]:
        """What must be known of a finished file when its jobs are not run again."""
        return {}

    def resume(self, notes: Mapping[str, Any]) -> None:
        """Take over what ``notes`` said."""
        return

    @abstractmethod
    def finish(
        self, work: Path, finished: Mapping[str, Finished], origin: Mapping[str, FileEntry]
    ) -> None:
        """Write everything that is no tensor, ``surgery.json`` last.

        Args:
            work: The folder, with all files of tensors in it.
            finished: Those files by name.
            origin: The files of the source.
        """
