"""``surgery.load``: the library's own object, from a spec."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from surgery.errors import CheckpointError, SourceError
from surgery.sources.libraries import require, version
from surgery.sources.request import Request, as_config, as_device, as_dtype, jsonable
from surgery.sources.spec import Spec, parse
from surgery.sources.store import HubRepository, LocalFolder, Store

SOURCE_ATTRIBUTE = "_surgery_source"


def load(
    spec: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    pretrained: bool | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
    allow_missing: bool = False,
    allow_unexpected: bool = False,
) -> nn.Module:
    """Load a model of timm, transformers or diffusers as the library's own object.

    Args:
        spec: ``timm:NAME``, ``transformers:MODEL_TYPE_OR_CLASS``, ``diffusers:CLASS``,
            ``preset:NAME``, ``hub:ORG/NAME[/SUBFOLDER][@REVISION]``, or the path of an existing
            folder in the hub's layout.
        config: Overrides of the configuration: arguments of ``timm.create_model``, fields of the
            transformers configuration (nested ones too), or arguments of the diffusers class; for
            a preset those of its library.
        pretrained: Whether to load weights. By default True for ``hub:`` and folders, and False
            for the other schemes.
        device: Where the model is put. On "meta" it is built at full size without allocation, and
            no weight is read.
        dtype: Floating dtype, such as "bfloat16"; by default the library's own choice.
        variant: Variant of the weight files, such as "fp16".
        allow_missing: Accept a checkpoint that lacks keys or has other shapes; what it lacks keeps
            its random initialisation and is listed in the log.
        allow_unexpected: Accept keys that have no place in the model.

    Returns:
        The model, whose type is exactly the library's class, in the mode (train or eval) the
        library leaves it in.

    Raises:
        SourceError: an unknown name, override or device, or the source cannot be reached.
        CheckpointError: a weight file is missing, truncated, unsafe, or does not fit.
    """
    parsed = parse(spec)
    saved = parsed.scheme in ("hub", "folder")
    request = Request(
        config=as_config(config),
        pretrained=saved if pretrained is None else pretrained,
        device=as_device(device),
        dtype=as_dtype(dtype),
        variant=variant,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )
    if saved:
        return _load_saved(parsed, request)
    if parsed.scheme == "preset":
        return _load_preset(parsed, request)
    library = _adapter(parsed.scheme)
    model: nn.Module = library.build(parsed.name, request)
    return _recorded(model, parsed, request, library.LIBRARY, {"revision": None, "files": []})


def skeleton(
    folder: Path, *, dtype: torch.dtype | None, stored_dtype: torch.dtype | None
) -> nn.Module:
    """The model that ``load`` gives for a folder, without its weights.

    Dtypes, ties, flags, buffers that no state dict holds and what is recorded of the source are
    those of the loaded model; parameters and what else is saved with them have no values yet.

    Args:
        folder: A folder in the hub's layout, with its weight files.
        dtype: As for ``load``.
        stored_dtype: Floating dtype of the weights, for a configuration that does not say.

    Raises:
        SourceError: an unknown architecture.
        CheckpointError: a weight file is missing or damaged.
    """
    request = Request(
        config={},
        pretrained=True,
        device=torch.device("cpu"),
        dtype=dtype,
        skeleton=True,
        stored_dtype=stored_dtype,
    )
    return _load_saved(parse(folder), request)


def _adapter(library: str) -> ModuleType:
    from surgery.sources import diffusers_models, timm_models, transformers_models

    return {
        "timm": timm_models,
        "transformers": transformers_models,
        "diffusers": diffusers_models,
    }[library]


def _load_preset(parsed: Spec, request: Request) -> nn.Module:
    from surgery.sources import presets

    model, library = presets.build(parsed.name, request)
    return _recorded(model, parsed, request, library, {"revision": None, "files": []})


def _load_saved(parsed: Spec, request: Request) -> nn.Module:
    store = _store(parsed)
    raw = store.read_json("config.json")
    if raw is None:
        raise _no_config(store)
    library = _adapter(_detect(raw, store))
    model, files = library.load_saved(store, raw, request)
    origin = {"revision": store.revision, "files": files}
    return _recorded(model, parsed, request, library.LIBRARY, origin)


def _store(parsed: Spec) -> Store:
    if parsed.scheme == "hub":
        require("huggingface_hub")
        return HubRepository(parsed.name, parsed.subfolder, parsed.revision)
    return LocalFolder(Path(parsed.name))


def _detect(raw: dict[str, Any], store: Store) -> str:
    """Which library wrote a ``config.json``, from the key only that library writes."""
    if isinstance(raw.get("_class_name"), str):
        return "diffusers"
    if isinstance(raw.get("architecture"), str):
        return "timm"
    if "model_type" in raw or "architectures" in raw:
        return "transformers"
    raise SourceError(
        f"{store.label}: config.json has none of '_class_name' (diffusers), 'architecture' (timm) "
        f"or 'model_type' (transformers); it has {', '.join(sorted(raw)) or 'no key'}"
    )


def _no_config(store: Store) -> SourceError | CheckpointError:
    index = store.read_json("model_index.json")
    if index is not None:
        parts = sorted(
            name
            for name, value in index.items()
            if not name.startswith("_")
            and isinstance(value, list)
            and all(cast("list[Any]", value))
        )
        example = "unet" if "unet" in parts else next(iter(parts), "unet")
        return SourceError(
            f"{store.label} is a pipeline of several models: {', '.join(parts)}",
            hint=f"load one of them: {store.label}/{example}",
        )
    for name, call in (
        ("surgery.json", "surgery.restore(folder)"),
        ("adapter_config.json", "surgery.load_adapter(model, folder)"),
    ):
        if store.get(name) is not None:
            return SourceError(
                f"{store.label} holds {name} and no config.json", hint=f"read it with {call}"
            )
    return CheckpointError(
        f"{store.label} has no config.json",
        hint="expected a folder as written by save_pretrained: config.json and the weights",
    )


def _recorded(
    model: nn.Module, parsed: Spec, request: Request, library: str, origin: dict[str, Any]
) -> nn.Module:
    model.__dict__[SOURCE_ATTRIBUTE] = {
        "format": 1,
        "spec": str(parsed),
        "library": library,
        "library_version": version(library),
        "config": jsonable(request.config, "config"),
        "pretrained": request.pretrained and request.device.type != "meta",
        **origin,
    }
    return model
