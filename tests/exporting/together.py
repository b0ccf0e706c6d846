"""Check many exports in one process that cannot import this library, instead of one for each.

Importing torch and transformers takes longer than loading a tiny model.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch import Tensor, nn

from surgery.exporting import Agreement, agreement, outputs
from surgery.exporting.code import apart


class Together:
    """Keeps a copy of every export that is written while it is there, and compares all at once.

    Args:
        scratch: An empty folder for the copies.
        patch: Puts it in the place of the check that each export makes.
    """

    def __init__(self, scratch: Path, patch: pytest.MonkeyPatch) -> None:
        self._scratch = scratch
        self._jobs: list[apart.Job] = []
        self._wanted: list[tuple[str, dict[str, Tensor]]] = []
        patch.setattr(apart, "agrees", self._agrees)

    def _agrees(self, consumer: str, model: nn.Module, job: apart.Job) -> Agreement:
        wanted = outputs(model, job.example)
        folder = shutil.copytree(job.folder, self._scratch / str(len(self._jobs)))
        self._jobs.append(apart.Job(folder, job.body, job.example))
        self._wanted.append((consumer, wanted))
        return agreement(consumer, [("compared later", wanted, wanted)])

    def compare(self) -> list[Agreement]:
        """How far each export is from its model, in the order in which they were written."""
        found = apart.run(self._jobs)
        return [
            agreement(consumer, [("the example", wanted, given)])
            for (consumer, wanted), given in zip(self._wanted, found, strict=True)
        ]
