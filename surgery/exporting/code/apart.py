"""Run an export in a Python process of its own, which cannot import this library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery.errors import ExportError
from surgery.exporting.agreement import Agreement, agreement, floating, outputs
from surgery.sources import Example
from surgery.verification import outputs as leaves_of_outputs

_LINES = 15

# ``surgery/verification/outputs.py`` needs torch alone, and is read by its path.
_SCRIPT = """
import sys
sys.modules["surgery"] = sys.modules["architectures"] = None
import importlib.util
import json
from pathlib import Path
import torch

spec = importlib.util.spec_from_file_location("leaves_of_outputs", sys.argv[1])
outputs = importlib.util.module_from_spec(spec)
sys.modules["leaves_of_outputs"] = outputs
spec.loader.exec_module(outputs)
for number, (folder, body) in enumerate(json.loads(Path("jobs.json").read_text("utf-8"))):
    names = {"folder": Path(folder)}
    exec(compile(body, folder, "exec"), names)
    call = torch.load(f"{number}.call", weights_only=True)
    with torch.no_grad():
        found = outputs.leaves(names["model"](*call["args"], **call["kwargs"]))
    tensors = {path: leaf for path, leaf in found.items() if isinstance(leaf, torch.Tensor)}
    torch.save(tensors, f"{number}.outputs")
"""


@dataclass(frozen=True)
class Job:
    """An export to load and to call.

    Attributes:
        folder: The export, ``folder`` in ``body``.
        body: Python that puts the loaded model into ``model``.
        example: The call; what is in it besides tensors are plain values.
    """

    folder: Path
    body: str
    example: Example


def agrees(consumer: str, model: nn.Module, job: Job) -> Agreement:
    """Compare what an export returns in a process of its own with what the model returns.

    Args:
        consumer: What loads the export, with its version.
        model: The model that was exported.
        job: What to load and how to call it.

    Raises:
        ExportError: it cannot be loaded or called there.
    """
    (found,) = run([job])
    told = f"{consumer} in a process without this library"
    return agreement(told, [("the example", outputs(model, job.example), found)])


def run(jobs: Sequence[Job]) -> list[dict[str, Tensor]]:
    """Load and call exports, one after the other in one process.

    Returns:
        The floating tensors that each returned, by path.

    Raises:
        ExportError: the process failed; its last lines are told.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for number, job in enumerate(jobs):
            on_cpu = job.example.to("cpu")
            call = {"args": on_cpu.args, "kwargs": on_cpu.kwargs}
            torch.save(call, place / f"{number}.call")
        listed = [(str(job.folder.resolve()), job.body) for job in jobs]
        (place / "jobs.json").write_text(json.dumps(listed), encoding="utf-8")
        (place / "run.py").write_text(_SCRIPT, encoding="utf-8")
        done = subprocess.run(  # noqa: S603 - this Python, with a script written here
            [sys.executable, str(place / "run.py"), str(leaves_of_outputs.__file__)],
            capture_output=True,
            text=True,
            check=False,
            cwd=scratch,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch},
        )
        if done.returncode:
            told = "\n  ".join(done.stderr.strip().splitlines()[-_LINES:])
            raise ExportError(
                f"the export does not load without this library:\n  {told}",
                hint="please report it with the model and its rules",
            )
        return [
            floating(torch.load(place / f"{number}.outputs", weights_only=True))
            for number in range(len(jobs))
        ]
