"""The rows of the survival table: what a rewritten model has to get through.

A row takes a ``Case`` and raises if something is not as it is on the reference. Every row also
runs on the unmodified model, which is then its own reference: what fails there is an upstream
cause. Rows return notes, such as the number of graphs, that the rewritten model is held to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.survival.calls import Case, Notes
from tests.survival.checkpointing import (
    checkpointing,
    checkpointing_reentrant,
    two_forwards,
    two_forwards_reentrant,
)
from tests.survival.compilers import (
    compiled,
    compiled_checkpointing,
    compiled_training,
    exported,
    onnx,
)
from tests.survival.copies import deepcopied, pickled, saved
from tests.survival.models import Subject
from tests.survival.parallel import autocast, functional, replicated, sharded, threads
from tests.survival.plain import all_gradients, dropout, eager, generation, hidden_states, shapes


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        key: Its name on the command line and in the results.
        check: What runs.
        title: As in the table.
        applies: Whether a model has such a thing at all.
        reduced: Whether the columns beside the main one run it.
        seconds: After which it is cut off.
    """

    key: str
    check: Callable[[Case], Notes]
    title: str
    applies: Callable[[Subject], bool] = lambda _: True
    reduced: bool = True
    seconds: int = 120


ROWS = (
    Row("eager", eager, "eager equals the reference"),
    Row("shapes", shapes, "another batch size and length"),
    Row("dropout", dropout, "train mode, dropout on, same seed"),
    Row("gradients", all_gradients, "gradients of parameters, coefficients and inputs"),
    Row("checkpointing", checkpointing, "gradient checkpointing"),
    Row("checkpointing-reentrant", checkpointing_reentrant, "gradient checkpointing, re-entrant"),
    Row("two-forwards", two_forwards, "two forwards before one backward"),
    Row("two-forwards-reentrant", two_forwards_reentrant, "the same, re-entrant checkpointing"),
    Row("compile", compiled, "torch.compile(fullgraph=True), eval", seconds=400),
    Row(
        "compile-training",
        compiled_training,
        "torch.compile(fullgraph=True), training",
        seconds=400,
    ),
    Row("compile-checkpointing", compiled_checkpointing, "compile with checkpointing", seconds=400),
    Row("export", exported, "torch.export"),
    Row("onnx", onnx, "ONNX run by onnxruntime", reduced=False, seconds=240),
    Row("generate", generation, "cached generate equals uncached", lambda s: s.generates),
    Row(
        "hidden-states",
        hidden_states,
        "intermediate states are those after mixing",
        lambda s: s.library != "diffusers",
    ),
    Row("pickle", pickled, "pickle, also loaded in another process"),
    Row("deepcopy", deepcopied, "deepcopy is independent"),
    Row("save", saved, "save and restore"),
    Row("ddp", replicated, "DDP, two gloo ranks", reduced=False),
    Row("fsdp2", sharded, "FSDP2, two gloo ranks"),
    Row("threads", threads, "two threads at once"),
    Row("autocast", autocast, "autocast bfloat16"),
    Row("functional-call", functional, "torch.func.functional_call"),
)
BY_KEY = {row.key: row for row in ROWS}
