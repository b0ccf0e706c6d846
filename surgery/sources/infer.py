"""Which rules infer an example input: by the library the model's class comes from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from architectures.backbones import Backbone
from surgery.errors import SourceError
from surgery.sources.draw import Draw, Uninferable
from surgery.sources.examples import Example
from surgery.sources.libraries import PLAIN, library_of, require, stock_class


def example_of(model: nn.Module, batch: int, seed: int) -> Example:
    """An example call for ``model`` with float32 values on the CPU.

    Raises:
        SourceError: no rule covers the model.
    """
    draw = Draw(batch, seed)
    signature = inspect.signature(inspect.unwrap(cast("Any", stock_class(model)).forward))
    parameters = {name: item for name, item in signature.parameters.items() if name != "self"}
    try:
        return _inferred(model, parameters, draw)
    except Uninferable as reason:
        raise SourceError(
            f"no example input could be inferred for {stock_class(model).__name__}: {reason}\n"
            f"  its forward is forward{signature.replace(parameters=list(parameters.values()))}",
            hint=f"write the call: example={_call(parameters)}",
        ) from None


def _inferred(model: nn.Module, parameters: Mapping[str, inspect.Parameter], draw: Draw) -> Example:
    library = next((name for cls in type(model).__mro__ if (name := library_of(cls))), None)
    if library == "transformers" and isinstance(model, require(library).PreTrainedModel):
        from surgery.sources import infer_transformers

        return Example((), infer_transformers.infer(model, parameters, draw))
    if library == "diffusers" and isinstance(model, require(library).ModelMixin):
        from surgery.sources import infer_diffusers

        return Example((), infer_diffusers.infer(model, parameters, draw))
    if library == PLAIN and isinstance(model, Backbone):
        return Example((draw.normal(draw.batch, *model.input_shape),))
    for name in ("pretrained_cfg", "default_cfg"):
        cfg = vars(model).get(name)
        if isinstance(cfg, Mapping) and "input_size" in cfg:
            return Example((draw.normal(draw.batch, *_image(model, cast("Any", cfg))),))
    raise Uninferable("it has neither a configuration of a known library nor a default_cfg")


def _image(model: nn.Module, cfg: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width: the model's own, or less where timm says that it takes less."""
    channels, height, width = cast("tuple[int, int, int]", tuple(cfg["input_size"]))
    fixed = bool(cfg.get("fixed_input_size"))
    if library_of(stock_class(model)) == "timm":
        traits = require("timm.models").get_model_input_config(model)
        channels, height, width = traits["input_size"]
        fixed = bool(traits["fixed_input_size"])
    if fixed:
        return channels, height, width
    least = cfg.get("min_input_size")
    pool = cfg.get("pool_size")
    if pool is None:
        return (channels, *least[1:]) if least else (channels, height, width)
    # pool_size is what is left of input_size at the end; four positions are enough.
    source = cfg["input_size"]
    floor = least or (0, 0, 0)
    sides = [
        min(side, max(4 * (source[axis] // pool[axis - 1]), floor[axis]))
        for axis, side in ((1, height), (2, width))
    ]
    return channels, sides[0], sides[1]


def _call(parameters: Mapping[str, inspect.Parameter]) -> str:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [item for item in parameters.values() if item.kind not in variadic]
    required = [item.name for item in named if item.default is item.empty]
    names = required or [item.name for item in named[:1]]
    if not names:
        return "surgery.Example((tensor, ...), {})"
    return "{" + ", ".join(f"{name!r}: tensor" for name in names) + "}"
