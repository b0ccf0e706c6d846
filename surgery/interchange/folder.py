"""Adapters of other libraries as files: PEFT's folders and diffusers' single files.

Nothing is unpickled, every tensor must be whole and finite, and what no file may say is refused
before the model is looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from surgery.checkpoints import tensorfile
from surgery.errors import CheckpointError
from surgery.interchange.adapter_config import AdapterConfig, parse
from surgery.untrusted.documents import read_bytes
from surgery.untrusted.paths import check_inside

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
#: Key of PEFT's configuration in the header of a file of diffusers.
DIFFUSERS_METADATA = "lora_adapter_metadata"
PREFIX = "base_model.model."
WRAPPED = "base_layer"

_PICKLES = (
    "adapter_model.bin",
    "adapter_model.pt",
    "adapter_model.pth",
    "pytorch_lora_weights.bin",
)
_ENTRY = re.compile(
    r"(?P<path>.+)\.(?P<what>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?=(?:\.weight)?$))(?:(?<=vector)\.weight)?"
)
_TIED_TO_PEFT = re.compile(r"\.lora_[A-Za-z]")
_KOHYA = ("lora_unet_", "lora_te")
_OLD_DIFFUSERS = ("lora.down.weight", "_lora.down.weight", "lora_linear_layer.down.weight")


@dataclass(frozen=True)
class Entry:
    """The tensors of one adapted layer.

    Attributes:
        path: Path of the module in the model.
        depth: How many wrappers of PEFT lie between this one and the module: of several adapted
            parameters of one module each has its own.
        tensors: By the last part of their key, such as ``lora_A.weight``.
    """

    path: str
    depth: int
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class Source:
    """An adapter as it was read.

    Attributes:
        where: The file, for messages.
        config: What decides what it computes; None for a file of diffusers that does not say.
        entries: Every adapted layer.
        stock: Trained stock tensors that came along, by their name in the model.
        base: Copies of adapted base weights that came along, by their name in the model.
    """

    where: str
    config: AdapterConfig
    entries: tuple[Entry, ...]
    stock: dict[str, Tensor]
    base: dict[str, Tensor]


def read(path: Path, components: Iterable[str], prefix: str | None) -> Source:
    """Read an adapter of PEFT, or of diffusers.

    Args:
        path: A folder, or a safetensors file of diffusers.
        components: Paths of the model's modules, by which the part of a pipeline's file that is
            for this model is told.
        prefix: The part of a pipeline's file to read, such as ``unet``.

    Raises:
        CheckpointError: there is no adapter, or it is damaged, pickled, or not of low rank.
    """
    if path.is_file():
        return _of_diffusers(path, set(components), prefix)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist", hint="give the adapter's folder")
    if (path / CONFIG).is_file():
        return _of_peft(path)
    if (path / DIFFUSERS_WEIGHTS).is_file():
        check_inside(path / DIFFUSERS_WEIGHTS, path)
        return _of_diffusers(path / DIFFUSERS_WEIGHTS, set(components), prefix)
    _refuse_pickles(path)
    present = ", ".join(sorted(each.name for each in path.iterdir())[:6]) or "nothing"
    raise CheckpointError(
        f"{path} holds no adapter: neither {CONFIG} (PEFT) nor {DIFFUSERS_WEIGHTS} (diffusers), "
        f"but {present}",
        hint="a folder of surgery.save is read by surgery.restore(folder, model=...)",
    )


def _refuse_pickles(path: Path) -> None:
    pickled = next((name for name in _PICKLES if (path / name).exists()), None)
    if pickled is not None:
        raise CheckpointError(
            f"{path / pickled} is a pickle, which can run any code when it is read",
            hint=f"load it in PEFT or diffusers if you trust it, and save it again as {WEIGHTS}",
        )


def _of_peft(path: Path) -> Source:
    check_inside(path / CONFIG, path)
    text = read_bytes(path / CONFIG)
    config = AdapterConfig.read(parse(text, str(path / CONFIG)), str(path / CONFIG))
    weights = path / WEIGHTS
    check_inside(weights, path)
    if not weights.is_file():
        _refuse_pickles(path)
        raise CheckpointError(f"{path} has a {CONFIG} and no {WEIGHTS}")
    tensors = _tensors(weights, tensorfile.contents(weights))
    foreign = [name for name in tensors if not name.startswith(PREFIX)]
    if foreign:
        raise CheckpointError(
            f"{weights}: the key {foreign[0]!r} does not begin with {PREFIX!r}, as PEFT's keys do"
        )
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return _sorted(str(weights), config, named)


def _of_diffusers(path: Path, components: set[str], prefix: str | None) -> Source:
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is no .safetensors file; other kinds can run any code when they are read"
        )
    slots = tensorfile.contents(path)
    _refuse_kohya(path, slots)
    metadata = _diffusers_metadata(path)
    chosen = prefix if prefix is not None else _prefix(path, slots, components)
    lead = f"{chosen}." if chosen else ""
    wanted = {name: slot for name, slot in slots.items() if name.startswith(lead)}
    if not wanted:
        raise CheckpointError(f"{path} holds nothing under {chosen!r}", hint=_leads(slots))
    named = {name.removeprefix(lead): tensor for name, tensor in _tensors(path, wanted).items()}
    named = _in_todays_names(named)
    alphas = {
        name.removesuffix(".alpha"): float(tensor)
        for name, tensor in named.items()
        if name.endswith(".alpha") and tensor.numel() == 1
    }
    named = {name: t for name, t in named.items() if name.removesuffix(".alpha") not in alphas}
    own = {key.removeprefix(lead): value for key, value in metadata.items() if key.startswith(lead)}
    return _sorted(str(path), _diffusers_config(path, own, named, alphas), named)


def _refuse_kohya(path: Path, names: Iterable[str]) -> None:
    odd = next((name for name in names if name.startswith(_KOHYA)), None)
    if odd is not None:
        raise CheckpointError(
            f"{path}: names such as {odd} are of kohya's trainer, and do not say which module they "
            "are of",
            hint="load the file into a pipeline of diffusers, which knows them, and save it from "
            "there: pipe.load_lora_weights(file), pipe.unet.save_lora_adapter(folder)",
        )


def _diffusers_metadata(path: Path) -> dict[str, Any]:
    told = tensorfile.metadata(path).get(DIFFUSERS_METADATA)
    if told is None:
        return {}
    where = f"{path} ({DIFFUSERS_METADATA})"
    data = parse(str(told).encode(), where)
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} is no JSON object")
    return cast("dict[str, Any]", data)


def _prefix(path: Path, names: Iterable[str], components: set[str]) -> str:
    """The part of a pipeline's file whose layers are those of the model."""
    modules = {_module_of(name) for name in names}
    leads = sorted({name.partition(".")[0] for name in modules})
    fitting = [
        lead
        for lead in ("", *leads)
        if (inside := [each for each in modules if each.startswith(f"{lead}." if lead else "")])
        and all(each.removeprefix(f"{lead}." if lead else "") in components for each in inside)
    ]
    if fitting:
        return fitting[0]
    # None fits: the first one is told apart layer by layer, with the names that differ.
    return "" if not leads or leads[0] in components else leads[0]


def _module_of(name: str) -> str:
    match = _ENTRY.fullmatch(name)
    if match is not None:
        return match["path"]
    old = next((each for each in ("_lora.", ".lora.", ".lora_linear_layer.") if each in name), None)
    return (
        name.rpartition(".")[0]
        if old is None
        else name.partition(old)[0].replace(".processor.", ".")
    )


def _leads(names: Iterable[str]) -> str:
    return f"it holds {', '.join(sorted({name.partition('.')[0] for name in names})[:6])}"


def _in_todays_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys as PEFT has them; those that diffusers wrote before it used PEFT are translated."""
    if any(name.endswith(_OLD_DIFFUSERS) for name in named):
        from diffusers.utils import state_dict_utils

        translate = cast("Any", state_dict_utils).convert_unet_state_dict_to_peft
        return cast("dict[str, Tensor]", translate(named))
    return named


def _diffusers_config(
    path: Path, own: Mapping[str, Any], named: Mapping[str, Tensor], alphas: Mapping[str, float]
) -> AdapterConfig:
    """What the header says; else what diffusers takes: alpha is the rank unless a tensor says."""
    if own:
        return AdapterConfig.read(dict(own), f"{path} ({DIFFUSERS_METADATA})")
    ranks = {
        match["path"]: tensor.shape[0]
        for name, tensor in named.items()
        if (match := _ENTRY.fullmatch(name)) and match["what"] == "lora_A.weight"
    }
    usual = next(iter(ranks.values()), 1)
    numerators = {layer: alphas.get(layer, rank) for layer, rank in ranks.items()}
    data = {
        "r": usual,
        "lora_alpha": usual,
        "alpha_pattern": {f"^{re.escape(k)}": v for k, v in numerators.items() if v != usual},
        "use_dora": any("lora_magnitude_vector" in name for name in named),
    }
    return AdapterConfig.read(data, str(path))


def _tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Every tensor, on the CPU.

    Raises:
        CheckpointError: one holds NaN or infinity, or is not of a floating type.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensorfile.read(path, names):
        if tensor.is_floating_point() and not bool(_wide(tensor).isfinite().all()):
            raise CheckpointError(
                f"{path}: {name} holds values that are NaN or infinite",
                hint="the adapter was damaged, or its training diverged",
            )
        found[name] = tensor
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() == 1 else tensor


def _sorted(where: str, config: AdapterConfig, named: Mapping[str, Tensor]) -> Source:
    entries: dict[tuple[str, int], Entry] = {}
    stock: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for name, tensor in named.items():
        match = _ENTRY.fullmatch(name)
        if match is not None:
            path, depth = _unwrapped(match["path"])
            entry = entries.setdefault((path, depth), Entry(path, depth))
            _check_factor(where, name, tensor)
            entry.tensors[match["what"]] = tensor
        elif _TIED_TO_PEFT.search(name):
            raise CheckpointError(
                f"{where}: {name} is no tensor of a plain LoRA or DoRA layer",
                hint="adapters with a lora_bias, or saved with the adapter's name in their keys, "
                "cannot be loaded",
            )
        else:
            parts = name.split(".")
            plain = ".".join(part for part in parts if part != WRAPPED)
            (base if WRAPPED in parts and parts[-1] != "bias" else stock)[plain] = tensor
    if not entries:
        raise CheckpointError(
            f"{where} holds no layer of an adapter", hint=_leads(named) if named else None
        )
    return Source(where, config, tuple(entries.values()), stock, base)


def _check_factor(where: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"{where}: {name} is {tensor.dtype}, expected floating numbers")
    if not tensor.numel() or not tensor.dim():
        raise CheckpointError(f"{where}: {name} is of shape {list(tensor.shape)}")


def _unwrapped(path: str) -> tuple[str, int]:
    """A path without PEFT's wrappers, and how many of them stand at its end."""
    parts = path.split(".")
    depth = 0
    while parts and parts[-1] == WRAPPED:
        parts.pop()
        depth += 1
    return ".".join(part for part in parts if part != WRAPPED), depth


def metadata_of(config: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """The header of a file of diffusers that holds PEFT's configuration under a prefix."""
    named = {f"{prefix}.{key}": value for key, value in config.items()}
    return {"format": "pt", DIFFUSERS_METADATA: json.dumps(named, indent=2, sort_keys=True)}
