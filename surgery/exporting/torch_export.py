"""``torch_export``: a ``.pt2`` file that ``torch.export.load`` reads, or an AOTInductor package.

The program takes the tensors that the example gives, by position or by name as the example does,
and returns a dictionary of the tensors that the model returns, by their path in its output, such
as ``logits``; ``output`` where it returns a tensor. Loading it needs torch and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from surgery.errors import ExportError
from surgery.exporting.agreement import Agreement, agreement, floating
from surgery.exporting.base import Format
from surgery.exporting.calls import (
    ModelFunction,
    Varying,
    dynamic_dimensions,
    further_calls,
    varied,
)
from surgery.exporting.programs import program, quiet, shortened
from surgery.rules.strict import options
from surgery.sources import Example

_FILE = "model.pt2"


@options
class TorchExport(Format):
    """``torch.export``.

    Attributes:
        dynamic: What may differ between calls; ``length`` only counts where the example has
            sequences.
        aot: Compile the program with AOTInductor for the device the model is on. The package is
            loaded with ``torch._inductor.aoti_load_package`` and needs no Python to run.
    """

    name: ClassVar[str] = "torch_export"
    file: ClassVar[str | None] = _FILE

    dynamic: Varying = ("batch", "length")
    aot: bool = False

    def misfit(self, model: nn.Module) -> str | None:
        """Any model may fit; whether torch.export traces it is seen when it does."""
        return None if not self.aot else missing_compiler()

    def write(self, model: nn.Module, work: Path, example: Example) -> None:
        """Trace, and write one file."""
        function = ModelFunction(model, varied(example, self.dynamic))
        traced = program(function, dynamic_dimensions(function.example, self.dynamic))
        with quiet():
            if not self.aot:
                torch.export.save(traced, work / _FILE)
                return
            try:
                compiled = cast("Any", torch._inductor).aoti_compile_and_package  # pyright: ignore[reportPrivateUsage]
                compiled(traced, package_path=str(work / _FILE))
            except Exception as error:
                raise ExportError(
                    f"AOTInductor could not compile the program: {shortened(error)}"
                ) from error

    def check(self, model: nn.Module, written: Path, example: Example) -> Agreement:
        """Load the file, and call it with other sizes too."""
        example = varied(example, self.dynamic)
        function = ModelFunction(model, example)
        calls = [
            (name, function.taken(call))
            for name, call in (("the example", example), *further_calls(example, self.dynamic))
        ]
        with quiet():
            run = _load(written / _FILE, aot=self.aot)
        return agreement(
            _consumer(aot=self.aot),
            [
                (name, floating(function.call(call)), floating(_run(run, call)))
                for name, call in calls
            ],
        )


def _load(file: Path, *, aot: bool) -> Callable[..., Any]:
    if aot:
        return cast("Any", torch._inductor).aoti_load_package(str(file))  # pyright: ignore[reportPrivateUsage]
    return torch.export.load(file).module()


def _run(run: Callable[..., Any], call: Example) -> dict[str, Tensor]:
    with torch.no_grad():
        try:
            return run(*call.args, **call.kwargs)
        except Exception as error:
            raise ExportError(
                f"the exported program does not take a call of other sizes: {shortened(error)}",
                hint="name the sizes that may vary: -O dynamic=[batch], or -O dynamic=[] for none",
            ) from error


def _consumer(*, aot: bool) -> str:
    return f"{'AOTInductor package' if aot else 'torch.export.load'} (torch {torch.__version__})"


def missing_compiler() -> str | None:
    """Why no C++ can be compiled here, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "AOTInductor needs a C++ compiler, and none is installed (g++ or clang++)"
    return None
