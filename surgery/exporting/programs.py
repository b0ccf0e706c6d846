"""Programs of ``torch.export``, of which several formats are made."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.export import Dim, ExportedProgram, ShapesCollection

from surgery.errors import ExportError
from surgery.exporting.calls import TensorFunction

_LINES = 12


def program(
    function: TensorFunction, dimensions: Mapping[int, Mapping[int, str]]
) -> ExportedProgram:
    """One call of a model as a graph of torch operations.

    Args:
        function: With the example that is traced.
        dimensions: ``id`` of an input → its dimensions that may vary.

    Raises:
        ExportError: torch.export cannot trace the call, or what should vary cannot.
    """
    example = function.example
    shapes = ShapesCollection()
    for tensor in example.tensors():
        free = dimensions.get(id(tensor))
        if free:
            shapes[tensor] = dict.fromkeys(free, Dim.DYNAMIC)
    # The model traces what a rewrite captures at its first call, which must not be this one.
    function.call(example)
    with quiet(), torch.no_grad():
        try:
            return torch.export.export(
                function,
                example.args,
                example.kwargs,
                dynamic_shapes=cast("Any", shapes).dynamic_shapes(
                    function, example.args, example.kwargs
                ),
            )
        except Exception as error:
            raise ExportError(
                f"torch.export could not trace the model: {shortened(error)}",
                hint="if a size is what cannot vary, name those that can: -O dynamic=[batch], or "
                "-O dynamic=[] for none",
            ) from error


def shortened(error: BaseException) -> str:
    """Kind and first lines of an error of a compiler, which may run over pages."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    more = ["..."] if len(lines) > _LINES else []
    return "\n  ".join([type(error).__name__, *lines[:_LINES], *more])


@contextmanager
def quiet() -> Generator[None]:
    """Keep the compilers' notes to developers from the person who exports."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
