"""How a model is described as JSON, and rebuilt from that without its weights at hand."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery import record
from surgery.errors import SourceError
from surgery.sources import diffusers_models, plain_models, timm_models, transformers_models
from surgery.sources.libraries import class_path, library_of, require, stock_class, version
from surgery.sources.load import SOURCE_ATTRIBUTE
from surgery.sources.request import Request, as_device, from_json, jsonable
from surgery.tree import children, joined

logger = logging.getLogger(__name__)

FORMAT = 1

_ADAPTERS = {
    "timm": timm_models,
    "transformers": transformers_models,
    "diffusers": diffusers_models,
    "plain": plain_models,
}
_MODEL_BASE = {"transformers": "PreTrainedModel", "diffusers": "ModelMixin"}


def describe(model: nn.Module) -> dict[str, Any] | None:
    """How to rebuild ``model`` with ``rebuild``, as JSON values.

    Works for a model from ``load`` and for one the user got from its library directly, before or
    after edits: what is described is the library's own class.

    Returns:
        The description, or None where the model cannot be rebuilt from one;
        ``why_undescribed`` says why.
    """
    try:
        return _described(model)
    except SourceError as error:
        logger.info("%s cannot be rebuilt from a description: %s", type(model).__name__, error)
        return None


def why_undescribed(model: nn.Module) -> str | None:
    """Why ``describe`` gives None, or None where it gives a description."""
    try:
        _described(model)
    except SourceError as error:
        return error.message
    return None


def rebuild(
    description: Mapping[str, Any],
    *,
    device: str | torch.device | None = None,
    parameters: Literal["meta"] | None = None,
) -> nn.Module:
    """Build the model that ``describe`` described: class, keys, shapes, dtypes and all buffers.

    Parameters hold placeholders, to be filled from a checkpoint; buffers that no state dict holds,
    such as rotary frequencies, have their true values. No file and no network is touched,
    and the global random generator is left alone.

    Args:
        description: From ``describe``; only classes that an installed library itself defines are
            ever resolved, so it may come from a file that was downloaded.
        device: Where the model is put; on "meta" nothing is allocated.
        parameters: On "meta" parameters hold nothing, and buffers have their values all the same.

    Raises:
        SourceError: the description is malformed, asks for anything but a model class of the three
            libraries, or no longer gives the model that was described.
    """
    checked = _checked(description)
    checked["config"] = from_json(checked["config"])
    place = as_device(device)
    library = checked["library"]
    dtypes = _dtypes(checked)
    request = Request(
        config=checked["config"],
        pretrained=False,
        device=torch.device("meta" if place.type == "meta" else "cpu"),
        dtype=None,
        skeleton=parameters == "meta",
    )
    state = torch.random.get_rng_state()
    try:
        with request.building(), _WithoutDraws():
            model = _ADAPTERS[library].rebuild(checked, dtypes.default, request)
    finally:
        torch.random.set_rng_state(state)
    if class_path(model) != checked["class"]:
        raise SourceError(
            f"the description is of {checked['class']}, but its configuration builds "
            f"{class_path(model)}"
        )
    _share(model, checked["shared"])
    _cast(model, dtypes)
    if checked["state"] is not None and checked["state"] != _fingerprint(model):
        raise SourceError(
            f"{checked['class']} built from its description has other keys or shapes than the "
            f"model that was described: expected {checked['state']['keys']} keys, "
            f"got {len(model.state_dict())}",
            hint=f"it was described with {library} {checked['library_version']}, "
            f"{version(library)} is installed",
        )
    origin = checked["source"]
    if origin is not None:
        model.__dict__[SOURCE_ATTRIBUTE] = json.loads(json.dumps(origin))
    return model if request.skeleton else nn.Module.to(model, place)


class _Dtypes:
    """The dtype of every floating tensor: one default, and the names that differ."""

    def __init__(self, default: torch.dtype, exceptions: Mapping[str, torch.dtype]) -> None:
        self.default = default
        self.exceptions = exceptions

    def __getitem__(self, name: str) -> torch.dtype:
        return self.exceptions.get(name, self.default)


class _WithoutDraws(TorchFunctionMode):
    """Fills parameters with a constant where the library draws them at random.

    Drawing billions of numbers takes minutes, and a checkpoint replaces them anyway. Anything that
    is not a parameter is drawn as usual: the rejection loop of a truncated normal depends on it.
    """

    # Compared by name: transformers puts wrappers of its own in the place of torch.nn.init's.
    _DRAWS = frozenset({"normal_", "uniform_", "kaiming_uniform_"})

    def __init__(self) -> None:
        super().__init__()
        self._filled: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func.__name__ in self._DRAWS:
            target = args[0] if args else named["tensor"]
            if isinstance(target, nn.Parameter):
                # The mean of a normal, the lower end of a uniform: what a rejection loop accepts.
                method = func in (Tensor.normal_, Tensor.uniform_) and len(args) > 1
                return self._fill(target, args[1] if method else 0.0)
        return func(*args, **named)

    def _fill(self, parameter: nn.Parameter, value: float) -> Tensor:
        # Layers fill their parameters, and then the model fills them again: once is enough.
        if value or id(parameter) not in self._filled:
            self._filled[id(parameter)] = parameter
            with torch.no_grad():
                parameter.fill_(value)
        return parameter


def _described(model: nn.Module) -> dict[str, Any]:
    cls = stock_class(model)
    library = library_of(cls)
    if library is None:
        raise SourceError(
            f"{class_path(model)} is a class of the user's own, not of timm, transformers or "
            "diffusers; give the model itself to surgery.restore(folder, model=...)"
        )
    base = _MODEL_BASE.get(library)
    if base is not None and not issubclass(cls, getattr(require(library), base)):
        raise SourceError(f"{class_path(model)} is a part of a {library} model, not a whole one")
    shared = _shared(model)
    edited = record.ATTRIBUTE in model.__dict__  # then the state dict is no longer the stock one
    description: dict[str, Any] = {
        "format": FORMAT,
        "library": library,
        "library_version": version(library),
        "class": class_path(model),
        **jsonable(_ADAPTERS[library].describe(model), "its configuration"),
        "dtypes": _dtype_names(model),
        **({"shared": shared} if shared else {}),
        "state": None if edited else _fingerprint(model),
        "source": model.__dict__.get(SOURCE_ATTRIBUTE),
    }
    if library == "timm" and not edited:
        # timm lets a model be changed after it was created; only a trial shows whether it was.
        rebuild(description, device="meta")
    return description


def _checked(description: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(description)
    if found.get("format") != FORMAT:
        raise SourceError(
            f"the description has format {found.get('format')!r}, expected {FORMAT}",
            hint="it was written by a newer model-surgery; upgrade it",
        )
    expected: dict[str, tuple[type, ...]] = {
        "library": (str,),
        "library_version": (str,),
        "class": (str,),
        "config": (dict,),
        "dtypes": (dict,),
        "shared": (dict,),
        "state": (dict, type(None)),
        "source": (dict, type(None)),
    }
    extra: dict[str, dict[str, tuple[type, ...]]] = {
        "timm": {"architecture": (str,), "pretrained_cfg": (dict,)},
        "transformers": {"config_class": (str,), "attention": (str, type(None))},
        "diffusers": {},
        "plain": {},
    }
    found.setdefault("shared", {})  # written only where a module is registered more than once
    library = found.get("library")
    if library not in extra:
        raise SourceError(
            f"the description names the library {library!r}, expected {', '.join(extra)}"
        )
    for key, kinds in {**expected, **extra[library]}.items():
        if key not in found or not isinstance(found[key], kinds):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise SourceError(f"the description's {key!r} is {found.get(key)!r}, expected {names}")
    return found


def _shared(model: nn.Module) -> dict[str, str]:
    """Every further path of a module that is registered more than once → its first path.

    What lies inside such a module is not listed, and neither is what a rewrite added.
    """
    first: dict[int, str] = {id(model): ""}
    found: dict[str, str] = {}

    def walk(path: str, module: nn.Module) -> None:
        for name, child in children(module).items():
            if _is_added(child):
                continue
            at = joined(path, name)
            if id(child) in first:
                found[at] = first[id(child)]
            else:
                first[id(child)] = at
                walk(at, child)

    walk("", model)
    return found


def _is_added(module: nn.Module) -> bool:
    home = type(module).__module__
    ours = home.startswith(("surgery.", "architectures."))
    return ours and library_of(type(module)) is None


def _share(model: nn.Module, shared: Mapping[str, Any]) -> None:
    """Register modules under their further paths, where the class does not do so itself."""
    for path, first in shared.items():
        try:
            module, other = model.get_submodule(str(first)), model.get_submodule(path)
        except AttributeError as error:
            raise SourceError(f"the description shares {first!r} with {path!r}: {error}") from error
        if type(module) is not type(other) or module is model:
            raise SourceError(
                f"the description shares {first!r} ({type(module).__name__}) with {path!r} "
                f"({type(other).__name__}), expected two modules of one class"
            )
        model.set_submodule(path, module)


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    lines = sorted(f"{key}:{list(value.shape)}" for key, value in _tensors_of_state(model))
    return {"keys": len(lines), "sha256": sha256("\n".join(lines).encode()).hexdigest()}


def _tensors_of_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            yield key, value


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            yield name, tensor


def _dtype_names(model: nn.Module) -> dict[str, Any]:
    names = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in _floating(model)}
    sizes: Counter[str] = Counter()
    for key, tensor in _floating(model):
        sizes[names[key]] += tensor.numel()
    default = sizes.most_common(1)[0][0] if sizes else "float32"
    return {
        "default": default,
        "exceptions": {key: name for key, name in names.items() if name != default},
    }


def _dtypes(description: Mapping[str, Any]) -> _Dtypes:
    written = cast("dict[str, Any]", description["dtypes"])
    exceptions = cast("dict[str, str]", written.get("exceptions", {}))
    return _Dtypes(
        _dtype(written.get("default")), {name: _dtype(dtype) for name, dtype in exceptions.items()}
    )


def _dtype(name: object) -> torch.dtype:
    found = torch.__dict__.get(name) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SourceError(f"the description names the dtype {name!r}, expected a floating dtype")
    return found


def _cast(model: nn.Module, dtypes: _Dtypes) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])
    for name, buffer in list(model.named_buffers()):
        if buffer.is_floating_point() and buffer.dtype != dtypes[name]:
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, buffer.to(dtypes[name]))
