"""What a run writes down: ``log.jsonl``, the coefficient matrices, TensorBoard.

One JSON object a line, each with ``kind`` and ``step``::

    {"kind": "step", "step": 10, "loss": 5.1, "lr": 0.001, "grad_norm": 1.2, "tokens": 40960,
     "seconds": 3.2, "per_second": 12800.0}
    {"kind": "evaluation", "step": 100, "loss": 3.2, "perplexity": 24.5}
    {"kind": "matrices", "step": 50, "file": "matrices/000050.safetensors"}
    {"kind": "event", "step": 120, "event": "skipped", "reason": "..."}

A resumed run first cuts the log back to the step it goes on from, so that the log reads as if
there had been no interruption.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from torch import Tensor

from surgery.errors import TrainingError
from surgery.train.views import matrix_image
from surgery.untrusted.documents import parse_object

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Kind = Literal["step", "evaluation", "matrices", "event"]

LOG = "log.jsonl"
MATRICES = "matrices"
TENSORBOARD = "tensorboard"


class RunLog:
    """The log of one run; on the main rank only.

    Args:
        out: The run's folder.
        tensorboard: Whether to write TensorBoard files too.
        step: The step that the run goes on from; 0 for a new one.
    """

    def __init__(self, out: Path, *, tensorboard: bool, step: int = 0) -> None:
        self.out = out
        rewind(out, step)
        self._file = (out / LOG).open("a", encoding="utf-8")
        self._board = _board(out / TENSORBOARD, step) if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, kind: Kind, step: int, values: Mapping[str, Any]) -> None:
        """Write one line; its numbers go to TensorBoard too."""
        line = {"kind": kind, "step": step, **{k: _plain(v) for k, v in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        # A killed process loses what it buffered, not what the system has.
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    _scalar(self._board, f"{kind}/{name}", value, step)

    def matrices(self, step: int, found: Mapping[str, Tensor]) -> None:
        """Write the coefficient matrices, name of the stack → (K, K)."""
        from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

        folder = self.out / MATRICES
        folder.mkdir(exist_ok=True)
        file = folder / f"{step:06d}.safetensors"
        tensors = {name: matrix.float().cpu().contiguous() for name, matrix in found.items()}
        beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        # A file of tensors sorts them; the order of the stacks in the model is kept beside.
        about = {"kind": "matrices", "step": str(step), "stacks": json.dumps(list(tensors))}
        save_file(tensors, beside, about)
        beside.replace(file)
        self.write("matrices", step, {"file": f"{MATRICES}/{file.name}"})
        if self._board is not None:
            for name, matrix in tensors.items():
                _image(self._board, f"matrices/{name}", matrix_image(matrix, name), step)


def lines(out: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a run's log; a last one that a kill cut short is left out."""
    path = out / LOG
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for text in file:
            if not text.endswith("\n"):
                return
            yield parse_object(text.encode(), str(path), error=TrainingError)


def rewind(out: Path, step: int) -> None:
    """Cut the log of a run back to a step: what came after it will come again."""
    path = out / LOG
    if not path.is_file():
        return
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with beside.open("w", encoding="utf-8") as file:
        for line in lines(out):
            if line["step"] <= step:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    for matrix in (out / MATRICES).glob("*.safetensors"):
        if int(matrix.stem) > step:
            matrix.unlink()


def _board(folder: Path, step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    purge = step + 1 if step else None
    return SummaryWriter(str(folder), purge_step=cast("Any", purge))


def _scalar(board: SummaryWriter, name: str, value: float, step: int) -> None:
    cast("Any", board).add_scalar(name, value, step)


def _image(board: SummaryWriter, name: str, image: Any, step: int) -> None:
    cast("Any", board).add_image(name, image, step, dataformats="HWC")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
