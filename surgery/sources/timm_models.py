"""Models of timm: created by name, or from a folder that timm saved."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.errors import CheckpointError, SourceError
from surgery.registry import suggest
from surgery.sources import weights
from surgery.sources.libraries import BUILD_ERRORS, attributes, require
from surgery.sources.request import Request
from surgery.sources.store import Store
from surgery.sources.weights import WeightFiles

LIBRARY = "timm"

_UNEXPECTED_ARGUMENT = re.compile(r"unexpected keyword argument '(\w+)'")
_FIXED_ARGUMENT = re.compile(r"got multiple values for keyword argument '(\w+)'")

# Arguments of create_model that are not the architecture's: load has its own word for each.
_RESERVED = {
    "pretrained": "pass pretrained= to load",
    "pretrained_cfg": "name the weights in the spec, as in timm:NAME.TAG",
    "pretrained_cfg_overlay": "load a folder that holds the weights",
    "checkpoint_path": "load a folder that holds the weights",
    "cache_dir": "set HF_HOME instead",
    "device": "pass device= to load",
    "dtype": "pass dtype= to load",
}


def names() -> list[str]:
    """Every architecture, without the tags of its pretrained weights."""
    return list(require(LIBRARY).list_models())


def build(name: str, request: Request) -> nn.Module:
    """The architecture ``name``, with timm's own pretrained weights if asked for."""
    timm = require(LIBRARY)
    _check_name(name)
    if not request.pretrained or request.device.type == "meta":
        return _create(name, request, pretrained=False)
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        tags = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        raise SourceError(
            f"timm has no pretrained weights for {name!r}",
            hint=f"with weights: {', '.join(tags)}" if tags else "pass pretrained=False",
        )
    _check_head(name, cfg.num_classes, request)
    try:
        return _create(name, request, pretrained=True)
    except SourceError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise SourceError(
            f"timm could not fetch the weights of {name!r}: {_first_line(error.__cause__)}",
            hint="check the network; or load a folder or hub:ID that is at hand, or pass "
            "pretrained=False",
        ) from error


def load_saved(store: Store, raw: dict[str, Any], request: Request) -> tuple[nn.Module, list[Any]]:
    """The model saved in ``store``, and the fingerprints of the weight files that were read."""
    name = str(raw["architecture"])
    _check_name(name)
    declared = {key: raw[key] for key in ("num_classes", "global_pool") if key in raw}
    settings = {**declared, **cast("dict[str, Any]", raw.get("model_args") or {})}
    cfg = _saved_cfg(name, raw)
    merged = replace(request, config={**settings, **request.config})
    if not request.names_weights:
        return _create(name, merged, pretrained=False, pretrained_cfg=cfg), []
    files = weights.find(
        store, safetensors="model", pickled="pytorch_model", variant=request.variant
    )
    if request.skeleton:
        return _create(name, merged, pretrained=False, pretrained_cfg=cfg), files.fingerprints()
    if "num_classes" in cfg:
        _check_head(store.label, cfg["num_classes"], merged)
    model = _filled(name, merged, cfg, files, store.label)
    return _placed(model, request), files.fingerprints()


def _filled(
    name: str, request: Request, cfg: dict[str, Any], files: WeightFiles, label: str
) -> nn.Module:
    # Read here first, so that a pickle or a corrupt file is refused before timm opens anything.
    state = weights.read(files)
    # timm deep-copies what is handed over in memory; a single file it can as well read itself.
    where = {"file": str(files.paths[0])} if len(files.paths) == 1 else {"state_dict": state}
    del state
    with _Copied() as copied:
        try:
            model = _create(
                name, request, pretrained=True, pretrained_cfg={**cfg, **where}, place=False
            )
        except SourceError as error:
            raise CheckpointError(
                f"{label} does not fit the model: {error.__cause__ or error.message}"
            ) from error
    held = model.state_dict(keep_vars=True)
    weights.check_fit(
        label,
        missing=[key for key, tensor in held.items() if tensor not in copied],
        unexpected=(),
        mismatched=(),
        allow_missing=request.allow_missing,
        allow_unexpected=request.allow_unexpected,
    )
    for key in where:
        cast("Any", model).pretrained_cfg.pop(key)
    return model


def describe(model: nn.Module) -> dict[str, Any]:
    """How to rebuild ``model``: the name and the arguments timm created it with.

    Raises:
        SourceError: timm did not create it, so nothing recorded its arguments.
    """
    own = attributes(model)
    if "pretrained_cfg" not in own or "_model_args" not in own:
        raise SourceError(
            "timm.create_model did not make this model, so its arguments are recorded nowhere"
        )
    cfg = cast("dict[str, Any]", own["pretrained_cfg"])
    return {
        "architecture": cfg["architecture"],
        "config": own["_model_args"],
        "pretrained_cfg": _without_places(cfg),
    }


def rebuild(description: Mapping[str, Any], dtype: torch.dtype, request: Request) -> nn.Module:
    """A model of the name and arguments in ``description``."""
    del dtype  # each tensor is cast to its own recorded dtype afterwards
    name = str(description["architecture"])
    _check_name(name)
    cfg = _without_places(description["pretrained_cfg"])
    return _create(name, request, pretrained=False, pretrained_cfg=cfg)


class _Copied(TorchFunctionMode):
    """Notes which tensors are copied into, since timm does not report what a checkpoint lacked."""

    def __init__(self) -> None:
        super().__init__()
        self._targets: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.copy_:
            self._targets[id(args[0])] = args[0]
        return func(*args, **(kwargs or {}))

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._targets


def _create(
    name: str,
    request: Request,
    *,
    pretrained: bool,
    pretrained_cfg: dict[str, Any] | None = None,
    place: bool = True,
) -> nn.Module:
    for key in request.config:
        if key in _RESERVED:
            raise SourceError(f"config: {key!r} is not the architecture's", hint=_RESERVED[key])
    try:
        with request.building():
            model = require(LIBRARY).create_model(
                name, pretrained=pretrained, pretrained_cfg=pretrained_cfg, **request.config
            )
    except BUILD_ERRORS as error:
        raise _explained(name, error) from error
    return _placed(model, request) if place else model


def _placed(model: nn.Module, request: Request) -> nn.Module:
    cast_model = model if request.dtype is None else model.to(dtype=request.dtype)
    return request.placed(cast_model)


def _explained(name: str, error: Exception) -> SourceError:
    unexpected = _UNEXPECTED_ARGUMENT.search(str(error))
    if isinstance(error, TypeError) and unexpected:
        key = unexpected.group(1)
        return SourceError(
            f"config: timm's {name} takes no {key!r}", hint=suggest(key, _arguments(name))
        )
    fixed = _FIXED_ARGUMENT.search(str(error))
    if isinstance(error, TypeError) and fixed:
        return SourceError(
            f"config: {fixed.group(1)!r} is what timm's name {name!r} stands for, and cannot be "
            "overridden",
            hint="load another name of the family that has the value you want",
        )
    return SourceError(f"timm could not build {name!r}: {error}")


def _arguments(name: str) -> list[str]:
    with torch.device("meta"):
        model = require(LIBRARY).create_model(name)
    parameters = inspect.signature(type(model).__init__).parameters
    return [key for key in parameters if key not in ("self", "args", "kwargs")]


def _check_name(name: str) -> None:
    timm = require(LIBRARY)
    bare = name.partition(".")[0]
    if bare not in timm.list_models():
        raise SourceError(
            f"timm {timm.__version__} has no model {name!r}", hint=suggest(bare, _short(bare))
        )
    tagged = timm.list_models(f"{bare}.*", pretrained=True)
    if name != bare and name not in tagged:
        raise SourceError(f"timm has no weights {name!r}", hint=suggest(name, tagged))


def _short(bare: str) -> list[str]:
    """The names to suggest from: those that share a beginning, so that a list stays readable."""
    family = [name for name in names() if name[:3] == bare[:3]]
    close = difflib.get_close_matches(bare, names(), cutoff=0.6)
    return close or family or ["see timm.list_models()"]


def _check_head(where: str, classes: int, request: Request) -> None:
    wanted = request.config.get("num_classes")
    if wanted in (None, classes, 0) or request.allow_missing:
        return
    raise CheckpointError(
        f"{where}: the weights have {classes} classes, config asks for num_classes={wanted}; "
        "timm would initialise the head anew",
        hint="pass allow_missing=True to train a new head",
    )


def _saved_cfg(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What timm is told about the saved weights: its own defaults, then what was saved."""
    default = require(LIBRARY).get_pretrained_cfg(name.partition(".")[0])
    saved = {**cast("dict[str, Any]", raw.get("pretrained_cfg") or {})}
    if "num_classes" in raw:
        saved["num_classes"] = raw["num_classes"]
    known: dict[str, Any] = {} if default is None else default.to_dict(remove_source=True)
    return _without_places(known | saved)


def _without_places(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Only load says where weights are, and that they are tensors in timm's own layout."""
    known = set(attributes(require("timm.models").PretrainedCfg()))
    places = {"state_dict", "file", "source", "custom_load"}
    return {key: value for key, value in cfg.items() if key in known - places}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
