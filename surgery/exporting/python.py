"""``python``: a folder with one Python file and its weights.

``model.py`` has the architecture with its rewrite and needs torch, safetensors and, where its
layers are used, timm::

    sys.path.insert(0, "out")
    from model import load
    model = load()
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from surgery.capture.graft import stock_class
from surgery.errors import ExportError
from surgery.exporting.agreement import Agreement
from surgery.exporting.base import Format
from surgery.exporting.code import apart
from surgery.exporting.code.literals import calls, literal
from surgery.exporting.code.rewrites import obstacle, rewrites_of
from surgery.exporting.code.text import Code
from surgery.exporting.provenance import NAME
from surgery.exporting.weights import SHARD, write_weights
from surgery.record import Record, record_of
from surgery.rules.strict import options
from surgery.sources import Example, describe, why_undescribed
from surgery.sources.libraries import BUILD_ERRORS, PLAIN, library_of, require
from surgery.sources.request import from_json

_FILE, _WEIGHTS = "model.py", "model"

_DOCSTRING = """A model: its architecture, and the weights in ``model.safetensors`` beside it.

    from model import load
    model = load()

Made by model-surgery; how and from what is in ``{name}``.
"""

_LOAD = '''def load(folder: str | Path = Path(__file__).parent) -> nn.Module:
    """The model with its weights, in eval mode.

    Args:
        folder: Where ``model.safetensors``, or its parts, are.
    """
    model = build()
    state: dict[str, Tensor] = {{}}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        state |= load_file(file)
    state.update({{alias: state[name] for alias, name in TIED.items()}})
    model.load_state_dict(state, assign=True)
    for alias, name in TIED.items():
        _tie(model, alias, name)
    return model.eval()


def _tie(model: nn.Module, alias: str, name: str) -> None:
    owner, _, key = alias.rpartition(".")
    other, _, same = name.rpartition(".")
    setattr(model.get_submodule(owner), key, getattr(model.get_submodule(other), same))


#: Further names of tensors that the file holds once.
TIED: dict[str, str] = {ties}'''

_RUN = """
import importlib.util
import sys
spec = importlib.util.spec_from_file_location("exported_model", folder / "model.py")
module = importlib.util.module_from_spec(spec)
sys.modules["exported_model"] = module
spec.loader.exec_module(module)
model = module.load()
"""


@options
class Python(Format):
    """One Python file and safetensors.

    Args:
        arguments: What a class of your own is made with, by name.
        max_shard_size: Bytes of the largest file of weights, as a number or as text.
    """

    name: ClassVar[str] = "python"

    arguments: Mapping[str, Any] = Field(default_factory=dict[str, Any])
    max_shard_size: int | str = SHARD

    def misfit(self, model: nn.Module) -> str | None:
        """Models of other libraries, of classes nobody can build again, and of captured graphs."""
        cls = stock_class(model)
        library = library_of(cls)
        if library is None:
            return _why_not_made(cls, self.arguments) or obstacle(model)
        if self.arguments:
            return f"how it is made is known from {library}; arguments= is for classes of your own"
        if library in {"transformers", "diffusers"}:
            return f"it is a model of {library}, for which the format {library!r} is meant"
        return why_undescribed(model) or obstacle(model)

    def write(self, model: nn.Module, work: Path, example: Example) -> None:
        """The file, and the weights."""
        rewrites = rewrites_of(model)
        ties = write_weights(model, work, _WEIGHTS, rewrites.dropped, self.max_shard_size)
        code = Code(rewrites)
        rewrite = code.rewrite()
        build = _build(model, code, self.arguments, rewritten=bool(rewrite))
        code.inlined.imported("from pathlib import Path", "Path", Path)
        code.inlined.imported(
            "from safetensors.torch import load_file", "load_file", cast("Any", load_file)
        )
        code.inlined.imported("from torch import Tensor", "Tensor", Tensor)
        load = _LOAD.format(ties=literal(ties))
        text = code.assembled(_DOCSTRING.format(name=NAME), rewrite, build, load)
        (work / _FILE).write_text(text, encoding="utf-8")

    def check(self, model: nn.Module, written: Path, example: Example) -> Agreement:
        """Load it in a process that cannot import this library."""
        return apart.agrees(_FILE, model, apart.Job(written, _RUN, example))

    def versions(self) -> dict[str, str]:
        """Of safetensors."""
        return {"safetensors": version("safetensors")}


def _why_not_made(cls: type[nn.Module], arguments: Mapping[str, Any]) -> str | None:
    """Why a class of the user's own cannot be made with these arguments, or None."""
    if cls.__qualname__ != cls.__name__:
        return f"{cls.__qualname__} is defined within something else, so it has no text of its own"
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        return (
            f"{cls.__name__} is a class of the user's own, and how it is made is not known "
            f"({error}); give its arguments: arguments={{'name': value}}"
        )
    return None


def _check_made(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Raise unless the arguments make a model with the tensors of this one.

    Raises:
        ExportError: they make none, or another.
    """
    cls = stock_class(model)
    called = f"{cls.__name__}({calls(arguments.items())})"
    try:
        with torch.device("meta"):
            made = cls(**arguments).state_dict()
    except BUILD_ERRORS as error:
        raise ExportError(f"{called} makes no model: {type(error).__name__}: {error}") from error
    record, state = record_of(model) or Record(), model.state_dict(keep_vars=True)
    added = {id(state.get(name)) for edit in record.edits for name in edit.adds}
    expected = {name: tuple(each.shape) for name, each in state.items() if id(each) not in added}
    found = {name: tuple(tensor.shape) for name, tensor in made.items()}
    odd = next((n for n in (*expected, *found) if expected.get(n) != found.get(n)), None)
    if odd is not None:
        raise ExportError(
            f"{called} makes another model: its {odd} is {found.get(odd)}, this one's "
            f"{expected.get(odd)}",
            hint="give the arguments this model was made with: arguments={'name': value}",
        )


def _build(model: nn.Module, code: Code, arguments: Mapping[str, Any], *, rewritten: bool) -> str:
    cls = stock_class(model)
    library = library_of(cls)
    described = cast("Mapping[str, Any]", describe(model) or {"config": {}})
    config = cast("dict[str, Any]", from_json(described["config"]))
    if library is None:
        _check_made(model, arguments)
        made = f"{code.stock(cls)}({calls(arguments.items())})"
    elif library == PLAIN:
        made = f"{code.stock(cls)}({calls(config.items())})"
    else:
        code.inlined.imported("import timm", "timm", require("timm"))
        name = literal(described["architecture"])
        made = f"timm.create_model({name}, pretrained=False, **{literal(config)})"
    lines = [
        "def build() -> nn.Module:",
        '    """The model with random weights."""',
        f"    model = {made}",
        *(["    rewrite(model)"] if rewritten else []),
        "    return model",
    ]
    return "\n".join(lines)
