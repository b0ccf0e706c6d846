"""Run an export in a Python process of its own, which cannot import this library."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
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
from pathlib import Path
import torch

folder, given, taken, leaves_file = map(Path, sys.argv[1:])
spec_of_leaves = importlib.util.spec_from_file_location("leaves_of_outputs", leaves_file)
leaves_module = importlib.util.module_from_spec(spec_of_leaves)
sys.modules["leaves_of_outputs"] = leaves_module
spec_of_leaves.loader.exec_module(leaves_module)
call = torch.load(given, weights_only=True)
{body}
with torch.no_grad():
    found = leaves_module.leaves(model(*call["args"], **call["kwargs"]))
tensors = {{path: leaf for path, leaf in found.items() if isinstance(leaf, torch.Tensor)}}
torch.save(tensors, taken)
"""


def agrees(consumer: str, folder: Path, body: str, model: nn.Module, example: Example) -> Agreement:
    """Compare what an export returns in a process of its own with what the model returns.

    Args:
        consumer: What loads the export, with its version.
        folder: The export, ``folder`` in ``body``.
        body: Python that puts the loaded model into ``model``.
        model: The model that was exported.
        example: The call; what is in it besides tensors are plain values.

    Raises:
        ExportError: it cannot be loaded or called there.
    """
    found = run(folder, body, example)
    told = f"{consumer} in a process without this library"
    return agreement(told, [("the example", outputs(model, example), found)])


def run(folder: Path, body: str, example: Example) -> dict[str, Tensor]:
    """Call a model that ``body`` loads and return its floating tensors by path.

    Args:
        folder: The export, ``folder`` in ``body``.
        body: Python that puts the model into ``model``.
        example: The call; what is in it besides tensors are plain values.

    Raises:
        ExportError: the process failed; its last lines are told.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, taken = Path(scratch, "call.pt"), Path(scratch, "outputs.pt")
        on_cpu = example.to("cpu")
        torch.save({"args": on_cpu.args, "kwargs": on_cpu.kwargs}, given)
        script = Path(scratch, "run.py")
        script.write_text(_SCRIPT.format(body=body), encoding="utf-8")
        done = subprocess.run(  # noqa: S603 - this Python, with a script written here
            [
                sys.executable,
                str(script),
                *map(str, (folder, given, taken, leaves_of_outputs.__file__)),
            ],
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
        return floating(torch.load(taken, weights_only=True))
