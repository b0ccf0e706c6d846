"""``diffusers``: a pipeline component that ``AutoModel.from_pretrained`` of diffusers loads.

The modelling file is generated from the rewritten methods and the inserted modules and subclasses
the stock classes; nothing of this library is needed to load it::

    component = diffusers.AutoModel.from_pretrained("out", trust_remote_code=True)
    pipeline = diffusers.DiTPipeline.from_pretrained(base, transformer=component)
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn

from surgery.capture.graft import stock_class
from surgery.exporting import remote
from surgery.exporting.agreement import Agreement
from surgery.exporting.base import Format
from surgery.exporting.code import apart
from surgery.exporting.code.rewrites import rewrites_of
from surgery.exporting.weights import SHARD, write_weights
from surgery.rules.strict import options
from surgery.sources import Example

_WEIGHTS = "diffusion_pytorch_model"


@options
class Diffusers(Format):
    """Remote code of diffusers; a plain folder where the architecture is the stock one.

    Args:
        max_shard_size: Bytes of the largest file of weights, as a number or as text.
    """

    name: ClassVar[str] = "diffusers"

    max_shard_size: int | str = SHARD

    def misfit(self, model: nn.Module) -> str | None:
        """Models of other libraries, and rewrites that are no text."""
        return remote.misfit(model, "diffusers")

    def write(self, model: nn.Module, work: Path, example: Example) -> None:
        """Configuration, weights, and the modelling file if one is needed."""
        rewrites = rewrites_of(model)
        config = {
            key: value
            for key, value in dict(cast("Any", model).config).items()
            if key not in {"_name_or_path", "_use_default_values"}
        }
        cls = stock_class(model)
        data: dict[str, Any] = {
            **config,
            "_class_name": cls.__name__,
            "_diffusers_version": version("diffusers"),
        }
        if rewrites.any:
            tested = {name: version(name) for name in ("torch", "diffusers")}
            name = remote.modeling_file(work, model, rewrites, config_class=None, tested=tested)
            data["_class_name"] = name
            data["auto_map"] = {"AutoModel": f"{remote.MODULE}.{name}"}
        remote.write_json(work / "config.json", data)
        write_weights(model, work, _WEIGHTS, rewrites.dropped, self.max_shard_size)

    def check(self, model: nn.Module, written: Path, example: Example) -> Agreement:
        """Load it in a process that cannot import this library."""
        remote_code = ", trust_remote_code=True" if rewrites_of(model).any else ""
        load = f"diffusers.AutoModel.from_pretrained(str(folder){remote_code})"
        dtype = str(next(model.parameters()).dtype)
        body = f"import diffusers\nimport torch\nmodel = {load}.to({dtype}).eval()"
        consumer = f"AutoModel.from_pretrained of diffusers {version('diffusers')}"
        return apart.agrees(consumer, model, apart.Job(written, body, example))

    def versions(self) -> dict[str, str]:
        """Of diffusers."""
        return {"diffusers": version("diffusers")}
