"""``python``: a folder with one Python file and its weights, for models of timm and plain ones.

``model.py`` has the architecture with its rewrite and needs torch, safetensors and, where its
layers are used, timm::

    sys.path.insert(0, "out")
    from model import load
    model = load()
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, cast

from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import nn

from surgery.capture.graft import stock_class
from surgery.exporting.agreement import Agreement
from surgery.exporting.base import Format
from surgery.exporting.code import apart
from surgery.exporting.code.rewrites import obstacle, rewrites_of
from surgery.exporting.code.text import Code, calls, literal
from surgery.exporting.provenance import NAME
from surgery.exporting.weights import write_weights
from surgery.rules.strict import options
from surgery.sources import Example, describe, why_undescribed
from surgery.sources.libraries import PLAIN, library_of, require
from surgery.sources.request import from_json

_FILE, _WEIGHTS = "model.py", "model.safetensors"

_DOCSTRING = """A model: its architecture, and the weights in ``model.safetensors`` beside it.

    from model import load
    model = load()

Made by model-surgery; how and from what is in ``{name}``.
"""

_LOAD = '''def load(folder: str | Path = Path(__file__).parent) -> nn.Module:
    """The model with its weights, in eval mode.

    Args:
        folder: Where ``model.safetensors`` is.
    """
    model = build()
    state = load_file(Path(folder) / "model.safetensors")
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
spec = importlib.util.spec_from_file_location("exported_model", folder / "model.py")
module = importlib.util.module_from_spec(spec)
sys.modules["exported_model"] = module
spec.loader.exec_module(module)
model = module.load()
"""


@options
class Python(Format):
    """One Python file and safetensors."""

    name: ClassVar[str] = "python"

    def misfit(self, model: nn.Module) -> str | None:
        """Models of other libraries, of classes nobody can build again, and of captured graphs."""
        library = library_of(stock_class(model))
        if library in {"transformers", "diffusers"}:
            return f"it is a model of {library}, for which the format {library!r} is meant"
        return why_undescribed(model) or obstacle(model)

    def write(self, model: nn.Module, work: Path, example: Example) -> None:
        """The file, and the weights."""
        rewrites = rewrites_of(model)
        ties = write_weights(model, work / _WEIGHTS, rewrites.dropped)
        code = Code(rewrites)
        rewrite = code.rewrite()
        build = _build(model, code, rewritten=bool(rewrite))
        code.inlined.imported("from pathlib import Path", "Path", Path)
        code.inlined.imported(
            "from safetensors.torch import load_file", "load_file", cast("Any", load_file)
        )
        load = _LOAD.format(ties=literal(ties))
        text = code.assembled(_DOCSTRING.format(name=NAME), rewrite, build, load)
        (work / _FILE).write_text(text, encoding="utf-8")

    def check(self, model: nn.Module, written: Path, example: Example) -> Agreement:
        """Load it in a process that cannot import this library."""
        return apart.agrees(_FILE, written, _RUN, model, example)

    def versions(self) -> dict[str, str]:
        """Of safetensors."""
        return {"safetensors": version("safetensors")}


def _build(model: nn.Module, code: Code, *, rewritten: bool) -> str:
    described = cast("Mapping[str, Any]", describe(model))
    config = cast("dict[str, Any]", from_json(described["config"]))
    if library_of(stock_class(model)) == PLAIN:
        cls = stock_class(model)
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
