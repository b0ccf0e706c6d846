"""An adapter of a model in PEFT's terms: the fields of its ``LoraConfig``, and its tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgery.errors import ExportError
from surgery.interchange import layout
from surgery.interchange.folder import WRAPPED
from surgery.interchange.layers import Layer, site_of
from surgery.interchange.layout import Kind
from surgery.passes.hosts import CHILD
from surgery.tree import joined, named_modules, named_parameters, own_buffers, own_parameters

_MERGED = "format='merged' writes the whole model with it"


@dataclass(frozen=True)
class PeftAdapter:
    """What PEFT loads.

    Attributes:
        fields: Arguments of ``peft.LoraConfig``.
        tensors: By their key in a state dict of the model that PEFT wraps, without the prefix and
            without the adapter's name.
    """

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Wrapped:
    """One adapted weight as PEFT wraps it."""

    layer: Layer
    kind: Kind

    @property
    def path(self) -> str:
        return self.layer.place.path

    @property
    def name(self) -> str:
        """What PEFT matches patterns with: the module, or the full name of the parameter."""
        return joined(self.path, self.layer.place.parameter) if self.is_parameter else self.path

    @property
    def is_parameter(self) -> bool:
        return self.kind == "parameter"


def in_peft(model: nn.Module, layers: Sequence[Layer], *, trained: bool) -> PeftAdapter:
    """An adapter as PEFT has it.

    Args:
        model: The model with the adapter.
        layers: What ``layers_of`` found in it.
        trained: Whether stock parameters that require gradients go along, as
            ``modules_to_save`` and biases.

    Raises:
        ExportError: PEFT has no layer that computes the same.
    """
    wrapped = [_Wrapped(layer, _kind(layer)) for layer in layers]
    _refuse_mixed_methods(layers)
    depths = _depths(wrapped)
    tensors = {
        f"{_within(each.path, depths, each)}.{name}": tensor
        for each in wrapped
        for name, tensor in _laid_out(each).items()
    }
    fields = _fields(model, wrapped)
    if trained:
        saved, biases = _trained(model, wrapped)
        fields["modules_to_save"] = saved or None
        fields["bias"] = "lora_only" if biases else "none"
        for path in saved:
            tensors |= {
                f"{_within(path, depths, None)}.{name}": tensor
                for name, tensor in _own(model.get_submodule(path)).items()
            }
        tensors |= {
            f"{_within(path, depths, None)}.{WRAPPED}.bias": bias for path, bias in biases.items()
        }
    return PeftAdapter(fields, {name: t.detach().contiguous() for name, t in tensors.items()})


def _kind(layer: Layer) -> Kind:
    place = layer.place
    if not place.path:
        raise ExportError(
            f"{place.parameter} is a parameter of the model itself, which PEFT cannot adapt",
            hint=_MERGED,
        )
    try:
        return layout.kind_of(place.host, layer.module, layer.matrix)
    except ValueError as error:
        raise _inexpressible(layer, error) from None


def _laid_out(each: _Wrapped) -> dict[str, Tensor]:
    layer = each.layer
    try:
        return layout.laid_out(
            each.kind, layer.module, layer.matrix, layer.A, layer.B, magnitude=layer.magnitude
        )
    except ValueError as error:
        raise _inexpressible(layer, error) from None


def _inexpressible(layer: Layer, error: ValueError) -> ExportError:
    return ExportError(
        f"PEFT has no adapter for {site_of(layer.place)} that computes the same: {error}",
        hint=_MERGED,
    )


def _refuse_mixed_methods(layers: Sequence[Layer]) -> None:
    scaled = [layer for layer in layers if layer.magnitude is not None]
    if scaled and len(scaled) < len(layers):
        plain = next(layer for layer in layers if layer.magnitude is None)
        raise ExportError(
            f"the adapter scales the rows of {site_of(scaled[0].place)} ({scaled[0].method}) and "
            f"not those of {site_of(plain.place)} ({plain.method}); of an adapter of PEFT all "
            "layers do, or none",
            hint="give the two rules adapters of different names, and export each",
        )


def _depths(wrapped: Iterable[_Wrapped]) -> dict[str, list[str]]:
    """Path of a module → those of its parameters that are adapted, the innermost wrapper first."""
    found: dict[str, list[str]] = {}
    for each in wrapped:
        if each.is_parameter:
            found.setdefault(each.path, []).append(each.layer.place.parameter)
    modules = {each.path: each.layer.module for each in wrapped}
    return {
        path: [name for name in own_parameters(modules[path]) if name in names]
        for path, names in found.items()
    }


def _within(path: str, depths: Mapping[str, list[str]], each: _Wrapped | None) -> str:
    """A path in the model that PEFT wrapped: each adapted parameter wraps its module once."""
    parts: list[str] = []
    at: list[str] = []
    for part in path.split("."):
        parts.append(part)
        at.append(part)
        around = depths.get(".".join(at), [])
        if each is not None and each.is_parameter and len(at) == path.count(".") + 1:
            outside = len(around) - 1 - around.index(each.layer.place.parameter)
            parts.extend([WRAPPED] * outside)
        elif len(at) <= path.count("."):
            parts.extend([WRAPPED] * len(around))
    return ".".join(parts)


def _fields(model: nn.Module, wrapped: Sequence[_Wrapped]) -> dict[str, Any]:
    rslora = all(each.layer.rslora for each in wrapped)
    ranks = {each.name: each.layer.rank for each in wrapped}
    alphas = {
        each.name: _number(
            each.layer.alpha
            if rslora or not each.layer.rslora
            else each.layer.scaling * each.layer.rank
        )
        for each in wrapped
    }
    rank, alpha = _usual(ranks), _usual(alphas)
    layers = [each.name for each in wrapped if not each.is_parameter]
    parameters = [each.name for each in wrapped if each.is_parameter]
    modules = [path for path, _ in named_modules(model) if not _is_inserted(path)]
    names = [name for name, _ in named_parameters(model) if not _is_inserted(name)]
    linear = [each.layer.matrix.transposed for each in wrapped if each.kind == "linear"]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": _patterns(alphas, alpha),
        "use_rslora": rslora,
        "use_dora": any(each.layer.magnitude is not None for each in wrapped),
        "lora_dropout": _dropout(wrapped),
        "target_modules": _targets(layers, modules, _regex) if layers else [],
        "target_parameters": _targets(parameters, names, _refuse) if parameters else None,
        "fan_in_fan_out": bool(linear) and all(linear),
        "inference_mode": True,
    }


def _is_inserted(name: str) -> bool:
    return CHILD in name.split(".")


def _number(value: float) -> float:
    """A whole number as such: most readers of the file know alpha as one."""
    return int(value) if value.is_integer() else value


def _usual(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _dropout(wrapped: Sequence[_Wrapped]) -> float:
    """The one dropout of PEFT's adapter; it drops nothing of an embedding's input."""
    told = {each.layer.dropout: each.name for each in wrapped if each.kind != "embedding"}
    embedded = {each.layer.dropout: each.name for each in wrapped if each.kind == "embedding"}
    if len(told) > 1 or (any(embedded) and len(told) == 1 and embedded.keys() != told.keys()):
        (one, name), (other, another) = list({**told, **embedded}.items())[:2]
        raise ExportError(
            f"the adapter drops {one:g} of the inputs of {name} and {other:g} of those of "
            f"{another}; an adapter of PEFT has one dropout",
            hint="give the rules adapters of different names, or the same dropout",
        )
    return next(iter(told), 0.0)


def _targets(
    wanted: Sequence[str], names: Iterable[str], ambiguous: Callable[[Sequence[str]], Any]
) -> Any:
    """What selects exactly these by PEFT's rule: a name, or its end after a dot."""
    others = [name for name in names if name not in set(wanted)]
    taken = {end for name in others for end in _ends(name)}
    found: dict[str, None] = {}
    for name in wanted:
        free = next((end for end in (*_ends(name)[:2], name) if end not in taken), None)
        if free is None:
            return ambiguous(wanted)
        found[free] = None
    return sorted(found)


def _ends(name: str) -> list[str]:
    """The ends of a dotted name that begin after a dot, and the name, shortest first."""
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _patterns(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Regular expressions for the names whose value is another than the usual one."""
    by_end: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_end.setdefault(_ends(name)[0], set()).add(value)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if value != usual:
            end = _ends(name)[0]
            found[re.escape(end) if len(by_end[end]) == 1 else f"^{re.escape(name)}"] = value
    return found


def _regex(wanted: Sequence[str]) -> str:
    return "|".join(re.escape(name) for name in sorted(wanted))


def _refuse(wanted: Sequence[str]) -> Any:
    raise ExportError(
        f"PEFT selects parameters by the end of their names, and {wanted[0]} is also the end of "
        "the name of another parameter, which is not adapted",
        hint=_MERGED,
    )


def _trained(model: nn.Module, wrapped: Sequence[_Wrapped]) -> tuple[list[str], dict[str, Tensor]]:
    """Modules with stock parameters that require gradients, and such biases of adapted ones."""
    adapted = {each.path for each in wrapped}
    modules: list[str] = []
    biases: dict[str, Tensor] = {}
    for path, module in named_modules(model, duplicates=False):
        own = own_parameters(module)
        training = [name for name, parameter in own.items() if parameter.requires_grad]
        if not training or _is_inserted(path):
            continue
        if path in adapted and training == ["bias"]:
            biases[path] = own["bias"]
        elif path in adapted or not path or _others(module):
            raise ExportError(
                f"{joined(path, training[0])} requires gradients, so it may have been trained, and "
                "PEFT's format has no place for it beside the adapter",
                hint="export with trained=False if it was not trained; else format='merged'",
            )
        else:
            modules.append(path)
    return modules, biases


def _others(module: nn.Module) -> bool:
    return any(name != CHILD for name, _ in module.named_children())


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {**own_parameters(module), **own_buffers(module)}
