"""``onnx``: an ONNX file whose sizes may vary, checked in onnxruntime at several of them.

The inputs bear the names of the model's own parameters, the outputs those of what it returns.
A decoder with a cache takes and returns the keys and values of earlier tokens, under the names
``past_key_values.N.key`` and ``present.N.key``, and may start from none.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from surgery.errors import ExportError
from surgery.exporting import decoding
from surgery.exporting.agreement import Agreement, agreement, floating
from surgery.exporting.base import Format
from surgery.exporting.calls import (
    ModelFunction,
    TensorFunction,
    Varying,
    dynamic_dimensions,
    further_calls,
    varied,
)
from surgery.exporting.programs import program, quiet, shortened
from surgery.rules.strict import options
from surgery.sources import Example
from surgery.tree import named_parameters

_FILE = "model.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@options
class Onnx(Format):
    """ONNX.

    Attributes:
        dynamic: What may differ between calls; ``length`` only counts where the example has
            sequences. A decoder with a cache always takes any batch and any lengths.
        cache: Whether a decoder takes and returns keys and values of earlier tokens.
        opset: Version of the operator set; the exporter's own choice by default.
    """

    name: ClassVar[str] = "onnx"
    file: ClassVar[str | None] = _FILE

    dynamic: Varying = ("batch", "length")
    cache: bool = False
    opset: Annotated[int, Field(ge=18)] | None = None

    def misfit(self, model: nn.Module) -> str | None:
        """Missing packages, dtypes that onnxruntime lacks, a cache where there is none."""
        absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if absent:
            return (
                f"{', '.join(absent)} not installed; pip install 'model-surgery[export]' "
                "installs them"
            )
        small = next((n for n, p in named_parameters(model) if p.dtype is torch.bfloat16), None)
        if small is not None:
            return f"{small} is bfloat16, for which onnxruntime lacks kernels; load it as float32"
        return decoding.misfit(model) if self.cache else None

    def write(self, model: nn.Module, work: Path, example: Example) -> None:
        """Trace, translate, name, and write; beyond 2 GB the weights get a file of their own."""
        function = self._function(model, example)
        dimensions = self._dimensions(function)
        traced = program(function, dimensions)
        outputs = list(function.call(function.example))
        with quiet():
            try:
                made: Any = cast("Any", torch.onnx).export(
                    traced,
                    dynamo=True,
                    verbose=False,
                    opset_version=self.opset,
                    input_names=[decoding.dotted(name) for name in function.names],
                    output_names=outputs,
                )
            except Exception as error:
                raise ExportError(
                    f"torch.onnx could not translate the model: {shortened(error)}"
                ) from error
            _name_dimensions(made.model, function, dimensions)
            made.save(str(work / _FILE))

    def check(self, model: nn.Module, written: Path, example: Example) -> Agreement:
        """Run it in onnxruntime on the CPU, with other sizes too."""
        function = self._function(model, example)
        session = _session(written / _FILE)
        return agreement(
            f"onnxruntime {version('onnxruntime')} (CPU)",
            [
                (name, floating(function.call(call)), _run(session, function, call))
                for name, call in self._calls(function, model, example)
            ],
        )

    def versions(self) -> dict[str, str]:
        """Of onnx, onnxscript and onnxruntime."""
        return {name: version(name) for name in _PACKAGES}

    def _function(self, model: nn.Module, example: Example) -> TensorFunction:
        if self.cache:
            return decoding.CachedDecoder(model, decoding.decoding_calls(model, example)[0][1])
        return ModelFunction(model, varied(example, self.dynamic))

    def _dimensions(self, function: TensorFunction) -> Mapping[int, Mapping[int, str]]:
        if self.cache:
            return decoding.dimensions(function.example)
        return dynamic_dimensions(function.example, self.dynamic)

    def _calls(
        self, function: TensorFunction, model: nn.Module, example: Example
    ) -> list[tuple[str, Example]]:
        if not isinstance(function, ModelFunction):
            return decoding.decoding_calls(model, example)
        example = varied(example, self.dynamic)
        calls = [("the example", example), *further_calls(example, self.dynamic)]
        return [(name, function.taken(call)) for name, call in calls]


def _session(file: Path) -> Any:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    quiet_log = onnxruntime.SessionOptions()
    quiet_log.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(
            str(file), sess_options=quiet_log, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ExportError(
            f"onnxruntime refuses the file that torch.onnx wrote: {shortened(error)}"
        ) from error


def _run(session: Any, function: TensorFunction, call: Example) -> dict[str, Tensor]:
    values = [*call.args, *call.kwargs.values()]
    names = [decoding.dotted(name) for name in function.names]
    wanted = {node.name for node in session.get_inputs()}
    feed = {
        name: value.detach().cpu().numpy()
        for name, value in zip(names, values, strict=True)
        if name in wanted
    }
    try:
        found = session.run(None, feed)
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot run the model at other sizes: {shortened(error)}",
            hint="name the sizes that may vary: -O dynamic=[batch], or -O dynamic=[] for none",
        ) from error
    outputs = [node.name for node in session.get_outputs()]
    tensors = map(cast("Any", torch).from_numpy, found)
    return floating(dict(zip(outputs, tensors, strict=True)))


def _name_dimensions(
    graph_model: Any, function: TensorFunction, dimensions: Mapping[int, Mapping[int, str]]
) -> None:
    """Call sizes ``batch`` and ``length`` instead of ``s14``, in inputs and outputs."""
    import onnx_ir

    tensors = function.example.tensors()
    words: dict[str, str] = {}
    for node, tensor in zip(graph_model.graph.inputs, tensors, strict=True):
        for axis, word in dimensions.get(id(tensor), {}).items():
            symbol = node.shape[axis]
            if isinstance(symbol, onnx_ir.SymbolicDim) and symbol.value is not None:
                words[symbol.value] = _word(word, axis)
    for node in (*graph_model.graph.inputs, *graph_model.graph.outputs):
        if node.shape is not None:
            node.shape = onnx_ir.Shape([_named(dim, words) for dim in node.shape])


def _word(word: str, axis: int) -> str:
    return {2: "height", 3: "width"}[axis] if word == "image" else word


def _named(dim: Any, words: Mapping[str, str]) -> Any:
    text = dim if isinstance(dim, int) else dim.value
    if not isinstance(text, str):
        return text
    return re.sub(r"\bs\d+\b", lambda found: words.get(found[0], found[0]), text)
