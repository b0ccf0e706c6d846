"""Models of transformers: built from a configuration, or loaded from a checked checkpoint."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from surgery.errors import CheckpointError, SourceError
from surgery.registry import suggest
from surgery.sources import weights
from surgery.sources.libraries import BUILD_ERRORS, attributes, require, resolve_class
from surgery.sources.request import Request, as_dtype
from surgery.sources.store import Store

LIBRARY = "transformers"

# Configuration entries that make the library run other code than the class that was asked for.
_REFUSED = {
    "quantization_config": "a checkpoint that is already quantised",
    "fusion_config": "fused replacements of the model's layers",
}


def names() -> list[str]:
    """Every model type and every model class that can be asked for."""
    return sorted({*_model_types(), *_model_classes()})


def build(name: str, request: Request) -> nn.Module:
    """The architecture ``name`` (a model type, a model class or a configuration class)."""
    config_class, model_class = _resolve(name)
    if request.pretrained:
        raise SourceError(
            f"transformers:{name} is an architecture; transformers ties no weights to it",
            hint="load the weights with hub:ORG/NAME or from a folder",
        )
    merged = _merged({}, request.config, config_class)
    config = _configure(config_class, model_class, merged, request.config)
    return _construct(model_class, config, request)


def load_saved(store: Store, raw: dict[str, Any], request: Request) -> tuple[nn.Module, list[Any]]:
    """The model saved in ``store``, and the fingerprints of the weight files that were read.

    Args:
        store: The files.
        raw: The content of its ``config.json``.
        request: What was asked for.
    """
    # A skeleton has no weights that could be quantised: it is the model that was quantised.
    ignored = {"quantization_config"} if request.skeleton else set[str]()
    _refuse({key: value for key, value in raw.items() if key not in ignored}, store.label)
    config_class = _config_class(raw, store.label)
    decoded = {key: value for key, value in _decoded(store).items() if key not in ignored}
    merged = _merged(decoded, request.config, config_class)
    model_class = _saved_class(merged, config_class, store.label)
    config = _configure(config_class, model_class, merged, request.config)
    if not request.names_weights:
        return _construct(model_class, config, request), []
    files = weights.find(
        store, safetensors="model", pickled="pytorch_model", variant=request.variant
    )
    if request.skeleton:
        return _finished(_skeleton(model_class, config, request), store), files.fingerprints()
    model = _fill(model_class, config, weights.read(files), store, request)
    return model.to(request.device), files.fingerprints()


def describe(model: nn.Module) -> dict[str, Any]:
    """How to rebuild ``model``: its class and its whole configuration."""
    untyped = cast("Any", model)
    return {
        "config_class": type(untyped.config).__name__,
        "config": untyped.config.to_dict(),
        "attention": untyped.config._attn_implementation,
    }


def rebuild(description: Mapping[str, Any], dtype: torch.dtype, request: Request) -> nn.Module:
    """A model of the class and configuration in ``description``."""
    del request  # the whole configuration is in the description
    model_class = resolve_class(LIBRARY, description["class"], "PreTrainedModel")
    raw = dict(description["config"])
    _refuse(raw, "the description")
    config_class = _config_class(raw, "the description")
    fits = issubclass(config_class, model_class.config_class or require(LIBRARY).PreTrainedConfig)
    if config_class.__name__ != description["config_class"] or not fits:
        raise SourceError(
            f"the description pairs {description['class']} with a configuration of the model type "
            f"{raw.get('model_type')!r} ({config_class.__name__}), which it does not take"
        )
    attention = description["attention"]
    if attention is not None:
        raw["attn_implementation"] = attention
    _refuse(raw, "the description")
    return model_class._from_config(config_class.from_dict(raw), dtype=dtype)


def _construct(model_class: Any, config: Any, request: Request) -> nn.Module:
    arguments = {} if request.dtype is None else {"dtype": request.dtype}
    try:
        with request.building():
            model: nn.Module = model_class._from_config(config, **arguments)
    except BUILD_ERRORS as error:
        raise SourceError(f"{model_class.__name__} could not be built: {error}") from error
    return request.placed(model)


def _skeleton(model_class: Any, config: Any, request: Request) -> nn.Module:
    """The model as ``from_pretrained`` would give it, in its dtypes and in eval mode."""
    dtype = request.dtype or as_dtype(config.dtype) or request.stored_dtype
    model = _construct(model_class, config, dataclasses.replace(request, dtype=dtype))
    # Parts that from_pretrained keeps in float32, by patterns of their names.
    for pattern, kept in cast("Any", model)._get_dtype_plan(dtype).items():
        found = re.compile(pattern.replace("*", ".*"))
        for name, parameter in model.named_parameters():
            if found.search(name):
                parameter.data = parameter.data.to(kept)
    return model.eval()


def _fill(
    model_class: Any, config: Any, state: dict[str, Any], store: Store, request: Request
) -> nn.Module:
    # The library is handed tensors and no path: it renames and fuses keys as it does for any
    # checkpoint, but opens no file of its own choice (adapters, pickles, remote code).
    try:
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=request.dtype or "auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
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
    return _finished(model, store)


def _finished(model: Any, store: Store) -> nn.Module:
    """What ``from_pretrained`` adds to a model from the folder beside the weights."""
    model.config.name_or_path = store.label
    model.name_or_path = store.label
    if model.can_generate() and store.read_json("generation_config.json") is not None:
        generation = require(LIBRARY).GenerationConfig
        model.generation_config = generation.from_pretrained(store.folder, local_files_only=True)
    return model


def _decoded(store: Store) -> dict[str, Any]:
    decoded, _ = require(LIBRARY).PreTrainedConfig.get_config_dict(
        str(store.folder), local_files_only=True
    )
    return decoded


def _model_types() -> list[str]:
    module = require("transformers.models.auto.configuration_auto")
    return list(module.CONFIG_MAPPING_NAMES)


def _model_classes() -> list[str]:
    module = require("transformers.models.auto.modeling_auto")
    tables: list[Mapping[str, Any]] = [
        table for name, table in attributes(module).items() if name.endswith("_MAPPING_NAMES")
    ]
    found: set[str] = set()
    for table in tables:
        for value in table.values():
            found.update([value] if isinstance(value, str) else value)
    return sorted(found)


def _resolve(name: str) -> tuple[Any, Any]:
    top = require(LIBRARY)
    if name in _model_types():
        config_class = top.CONFIG_MAPPING[name]
        return config_class, _base_class(config_class)
    found = getattr(top, name, None) if name in dir(top) else None
    if isinstance(found, type) and issubclass(found, top.PreTrainedConfig):
        return found, _base_class(found)
    if isinstance(found, type) and issubclass(found, top.PreTrainedModel):
        config_class = cast("Any", found).config_class
        if config_class is not None:
            return config_class, found
    raise SourceError(
        f"transformers {top.__version__} has no architecture {name!r}",
        hint=f"{suggest(name, names()) if _near(name) else 'no name is close'} "
        "Expected a model type such as 'llama', or a class such as 'LlamaForCausalLM'.",
    )


def _near(name: str) -> bool:
    return suggest(name, names()).startswith("did you mean")


def _base_class(config_class: Any) -> Any:
    mapping = cast("Mapping[Any, Any]", require(LIBRARY).MODEL_MAPPING)
    if config_class not in mapping:
        raise SourceError(
            f"transformers has no plain model for {config_class.__name__}",
            hint="name the model class instead of the model type",
        )
    found = mapping[config_class]
    return cast("tuple[Any, ...]", found)[0] if isinstance(found, (tuple, list)) else found


def _config_class(raw: Mapping[str, Any], where: str) -> Any:
    model_type = raw.get("model_type")
    known = _model_types()
    if model_type not in known:
        remote = (
            " It asks for code of its own (auto_map), which is never run."
            if ("auto_map" in raw)
            else ""
        )
        raise SourceError(
            f"{where}: transformers has no model type {model_type!r}.{remote}",
            hint=suggest(str(model_type), known)
            if model_type
            else "config.json lacks 'model_type'",
        )
    return require(LIBRARY).CONFIG_MAPPING[model_type]


def _saved_class(merged: Mapping[str, Any], config_class: Any, where: str) -> Any:
    architectures = merged.get("architectures")
    if not architectures:
        return _base_class(config_class)
    name = str(architectures[0])
    top = require(LIBRARY)
    found = getattr(top, name, None) if name in dir(top) else None
    if isinstance(found, type) and issubclass(found, top.PreTrainedModel):
        return found
    raise SourceError(
        f"{where}: transformers {top.__version__} has no model class {name!r}; "
        "code that comes with a checkpoint is never run",
        hint="pass config={'architectures': ['CLASS']} to load it into another class",
    )


def _merged(
    base: dict[str, Any], overrides: Mapping[str, Any], config_class: Any
) -> dict[str, Any]:
    """``base`` with ``overrides``; those of a sub-configuration are merged into its own entry."""
    _refuse(overrides, "config=")
    merged = {**base, **overrides}
    for key, spec in config_class.sub_configs_defaults.items():
        given = overrides.get(key)
        if isinstance(given, Mapping):
            defaults = base.get(key) or spec.init_kwargs
            inner = _sub_config_class(spec, cast("Mapping[str, Any]", given), defaults)
            nested = cast("Mapping[str, Any]", given)
            merged[key] = _merged(dict(defaults), nested, inner)
            if spec.config_class is not inner:
                merged[key].setdefault("model_type", inner.model_type)
    return merged


def _sub_config_class(spec: Any, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    top = require(LIBRARY)
    if issubclass(spec.config_class, top.PreTrainedConfig):
        return spec.config_class
    model_type = given.get("model_type") or defaults.get("model_type") or spec.model_type
    if model_type not in _model_types():
        raise SourceError(f"config: no model type {model_type!r} for a sub-configuration")
    return top.CONFIG_MAPPING[model_type]


def _configure(
    config_class: Any, model_class: Any, merged: dict[str, Any], overrides: Mapping[str, Any]
) -> Any:
    _check_names(config_class, model_class, overrides, "config")
    strict_error = require("huggingface_hub.errors").StrictDataclassError
    try:
        config = config_class.from_dict(dict(merged))
    except (*BUILD_ERRORS, strict_error) as error:
        raise SourceError(f"{config_class.__name__} refused its values: {error}") from error
    _check_swallowed(config, model_class, overrides)
    return config


def _check_names(
    config_class: Any, model_class: Any, overrides: Mapping[str, Any], where: str
) -> None:
    declared = _declared(config_class)
    accepted = declared | _converted(config_class)
    for key, value in overrides.items():
        if key not in accepted and not _reads(model_class, key):
            raise SourceError(
                f"{where}: {config_class.__name__} has no field {key!r}",
                hint=suggest(key, declared),
            )
        spec = config_class.sub_configs_defaults.get(key)
        if spec is not None and isinstance(value, Mapping):
            nested = cast("Mapping[str, Any]", value)
            inner = _sub_config_class(spec, nested, spec.init_kwargs)
            _check_names(inner, model_class, nested, f"{where}.{key}")


def _check_swallowed(config: Any, model_class: Any, overrides: Mapping[str, Any]) -> None:
    """The library keeps what it does not know as an attribute that nothing reads."""
    declared = _declared(type(config))
    for key in overrides:
        if key in attributes(config) and key not in declared and not _reads(model_class, key):
            raise SourceError(
                f"config: {type(config).__name__} has no field {key!r}", hint=suggest(key, declared)
            )


def _reads(model_class: Any, key: str) -> bool:
    """Whether the model's code reads a field that its configuration class does not declare.

    DeBERTa-v2 takes ``position_buckets`` so, with ``getattr(config, "position_buckets", -1)``.
    """
    module = inspect.getmodule(model_class)
    source = "" if module is None else inspect.getsource(module)
    name = re.escape(key)
    return re.search(rf"\bconfig(\.{name}\b|, [\"']{name}[\"'])", source) is not None


def _declared(config_class: Any) -> set[str]:
    fields = {field.name for field in dataclasses.fields(config_class)}
    writable = {
        name
        for cls in config_class.__mro__
        for name, member in attributes(cls).items()
        if isinstance(member, property) and member.fset is not None and not name.startswith("_")
    }
    return (
        fields | writable | set(config_class.attribute_map) | {"model_type", "attn_implementation"}
    )


def _converted(config_class: Any) -> set[str]:
    """Names the class itself reads from its extra arguments, such as a former name of a field.

    transformers keeps no list of them; they are the strings its ``__post_init__`` mentions.
    """
    readers = [
        member
        for cls in config_class.__mro__
        for name, member in attributes(cls).items()
        if name in ("__post_init__", "convert_rope_params_to_dict") and callable(member)
    ]
    return {text for reader in readers for text in _strings(inspect.unwrap(reader))} - {""}


def _strings(function: Any) -> Iterator[str]:
    for constant in function.__code__.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant


def _refuse(raw: Mapping[str, Any], where: str) -> None:
    for key, what in _REFUSED.items():
        if raw.get(key):
            raise SourceError(
                f"{where}: {key!r} asks for {what}, which load does not do",
                hint="load it with transformers itself and pass the module to surgery.plan",
            )
    for key, value in raw.items():
        if key.endswith("_implementation") and "/" in str(value):
            raise SourceError(f"{where}: {key}={value!r} would download code; it is never run")
        if isinstance(value, Mapping) and key.endswith("config"):
            _refuse(cast("Mapping[str, Any]", value), where)
