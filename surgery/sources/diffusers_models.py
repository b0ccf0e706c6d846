"""Models of diffusers: built from constructor arguments, or loaded from a checked checkpoint."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from surgery.errors import CheckpointError, SourceError
from surgery.registry import suggest
from surgery.sources import weights
from surgery.sources.libraries import BUILD_ERRORS, require, resolve_class
from surgery.sources.request import Request, jsonable
from surgery.sources.store import Store

LIBRARY = "diffusers"


def names() -> list[str]:
    """Every model class at the top of diffusers."""
    top = require(LIBRARY)
    tables = cast("dict[str, list[str]]", require("diffusers.models")._import_structure)
    listed = {name for group in tables.values() for name in group}
    return sorted(listed & set(dir(top)))


def build(name: str, request: Request) -> nn.Module:
    """The class ``name``; ``config`` are the arguments of its constructor."""
    model_class = _resolve(name, "")
    _check_names(model_class, request.config)
    if request.pretrained:
        raise SourceError(
            f"diffusers:{name} is an architecture; diffusers ties no weights to it",
            hint="load the weights with hub:ORG/NAME/SUBFOLDER or from a folder",
        )
    return _construct(model_class, request.config, request)


def load_saved(store: Store, raw: dict[str, Any], request: Request) -> tuple[nn.Module, list[Any]]:
    """The model saved in ``store``, and the fingerprints of the weight files that were read."""
    model_class = _resolve(str(raw["_class_name"]), f"{store.label}: ")
    _check_names(model_class, request.config)
    if raw.get("quantization_config"):
        raise SourceError(
            f"{store.label}: 'quantization_config' asks for a checkpoint that is already quantised",
            hint="load it with diffusers itself and pass the module to surgery.plan",
        )
    arguments = {**_arguments(raw), **request.config}
    if not request.names_weights:
        return _construct(model_class, arguments, request), []
    stem = "diffusion_pytorch_model"
    files = weights.find(store, safetensors=stem, pickled=stem, variant=request.variant)
    if request.skeleton:
        return _skeleton(model_class, arguments, request), files.fingerprints()
    if files.pickled:
        weights.read(files)  # refuses what weights_only does not accept, before diffusers opens it
    try:
        model, info = model_class.from_pretrained(
            str(store.folder),
            use_safetensors=not files.pickled,
            variant=request.variant,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            low_cpu_mem_usage=bool(model_class._keep_in_fp32_modules),
            output_loading_info=True,
            torch_dtype=request.dtype,
            **request.config,
        )
    except BUILD_ERRORS as error:
        raise CheckpointError(f"{store.label}: could not be loaded: {error}") from error
    weights.check_fit(
        store.label,
        missing=info["missing_keys"],
        unexpected=info["unexpected_keys"],
        mismatched=[(key, tuple(got), tuple(want)) for key, got, want in info["mismatched_keys"]],
        allow_missing=request.allow_missing,
        allow_unexpected=request.allow_unexpected,
    )
    return model.to(request.device), files.fingerprints()


def describe(model: nn.Module) -> dict[str, Any]:
    """How to rebuild ``model``: the arguments of its constructor.

    Some classes write more than those into their configuration, for their own forward.
    """
    known = _parameters(type(model))
    config = _arguments(cast("Any", model).config)
    return {"config": {key: value for key, value in config.items() if key in known}}


def rebuild(description: Mapping[str, Any], dtype: torch.dtype, request: Request) -> nn.Module:
    """A model of the class and constructor arguments in ``description``."""
    del dtype  # each tensor is cast to its own recorded dtype afterwards
    model_class = resolve_class(LIBRARY, description["class"], "ModelMixin")
    _check_names(model_class, request.config)
    return _construct(model_class, request.config, request)


def _skeleton(model_class: Any, config: Mapping[str, Any], request: Request) -> nn.Module:
    """The model as ``from_pretrained`` would give it, in its dtypes and in eval mode."""
    before = torch.get_default_dtype()
    # Buffers that no state dict holds keep the dtype they are computed in.
    torch.set_default_dtype(request.dtype or before)
    try:
        model = _construct(model_class, config, replace(request, dtype=None))
    finally:
        torch.set_default_dtype(before)
    kept = set(model_class._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if kept and request.dtype is not None:
            single = kept.intersection(name.split("."))
            parameter.data = parameter.data.to(torch.float32 if single else request.dtype)
    return model.eval()


def _construct(model_class: Any, config: Mapping[str, Any], request: Request) -> nn.Module:
    try:
        with request.building():
            # from_config also translates what older versions of the library wrote.
            model = model_class.from_config({**config, "_class_name": model_class.__name__})
    except BUILD_ERRORS as error:
        raise SourceError(f"diffusers could not build {model_class.__name__}: {error}") from error
    if request.dtype is not None:
        nn.Module.to(model, dtype=request.dtype)
    return request.placed(model)


def _resolve(name: str, where: str) -> Any:
    top = require(LIBRARY)
    found = getattr(top, name, None) if name in names() else None
    if isinstance(found, type) and issubclass(found, top.ModelMixin):
        return found
    raise SourceError(
        f"{where}diffusers {top.__version__} has no model class {name!r}",
        hint=suggest(name, _models_like(name)),
    )


def _models_like(name: str) -> list[str]:
    close = difflib.get_close_matches(name, names(), cutoff=0.6)
    return close or ["UNet2DConditionModel", "DiTTransformer2DModel", "AutoencoderKL", "..."]


def _parameters(model_class: Any) -> list[str]:
    return [name for name in inspect.signature(model_class.__init__).parameters if name != "self"]


def _check_names(model_class: Any, overrides: Mapping[str, Any]) -> None:
    parameters = _parameters(model_class)
    for key in overrides:
        if key not in parameters:
            raise SourceError(
                f"config: {model_class.__name__} takes no {key!r}", hint=suggest(key, parameters)
            )


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: jsonable(value, f"config: {key}")
        for key, value in config.items()
        if not key.startswith("_")
    }
