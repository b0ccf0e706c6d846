"""A head for the task: the one that a model comes with, or a new one drawn from the seed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import nn

from surgery.errors import ModelStateError
from surgery.record import record_of
from surgery.sources.libraries import installed, require
from surgery.tree import named_parameters

if TYPE_CHECKING:
    from surgery.train.data.base import Facts

Wanted = Literal["auto", "new", "keep"]

#: Objective → transformers' table of the classes that have its head, by type of model.
_TABLES = {
    "language": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-language": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
_CLASSIFIES = ("sequence-classification", "classification")


@runtime_checkable
class _Resettable(Protocol):
    """A model of timm, whose head can be made anew."""

    num_classes: int

    def reset_classifier(self, num_classes: int) -> None: ...


@dataclass(frozen=True)
class Headed:
    """A model with a head for its task.

    Attributes:
        model: The model.
        new: Names of parameters that did not come with the source, in their order.
    """

    model: nn.Module
    new: tuple[str, ...] = ()


def with_head(model: nn.Module, objective: str, facts: Facts, wanted: Wanted, seed: int) -> Headed:
    """Give a model the head that an objective needs, unless it has one.

    Args:
        model: As it was loaded.
        objective: Kind of the objective.
        facts: What the data is: its classes.
        wanted: Section ``model``, ``head``.
        seed: What a new head is drawn from.

    Raises:
        ModelStateError: the model has no such head and cannot get one, or should keep one that
            does not fit.
    """
    if objective == "diffusion":
        return Headed(model)
    if _is_transformers(model):
        return _transformers(model, objective, facts, wanted, seed)
    if objective == "classification" and isinstance(model, _Resettable):
        return _timm(model, facts, wanted, seed)
    if wanted == "new":
        raise ModelStateError(
            f"{type(model).__name__} is of no library whose heads can be made anew",
            hint="leave model.head out, or give the class a head that fits",
        )
    return Headed(model)


def _timm(model: Any, facts: Facts, wanted: Wanted, seed: int) -> Headed:
    classes = facts.classes or 0
    if wanted == "keep" or (wanted == "auto" and model.num_classes == classes):
        return Headed(model)
    _check_stock(model)
    before = {id(parameter) for _, parameter in named_parameters(model)}
    dtype = next(model.parameters()).dtype
    cast("Any", torch).manual_seed(seed)
    model.reset_classifier(classes)
    model.to(dtype)
    fresh = tuple(name for name, p in named_parameters(model) if id(p) not in before)
    return Headed(model, fresh)


def _transformers(model: Any, objective: str, facts: Facts, wanted: Wanted, seed: int) -> Headed:
    name = _class_for(model, objective)
    fits = type(model).__name__ == name or (name is None and _has_logits(model))
    classes = facts.classes if objective in _CLASSIFIES else None
    if fits and classes is not None and wanted != "keep":
        fits = model.config.num_labels == classes
    if wanted == "keep" or (wanted == "auto" and fits):
        _name_classes(model, facts, classes)
        return Headed(model)
    if name is None:
        raise ModelStateError(
            f"transformers has no class with a head for {objective} of the model type "
            f"{model.config.model_type!r}",
            hint="choose another model, or another objective",
        )
    _check_stock(model)
    return _headed(model, getattr(require("transformers"), name), facts, classes, seed)


def _headed(model: Any, cls: Any, facts: Facts, classes: int | None, seed: int) -> Headed:
    """The body of a model under a class that has the head; its tensors are taken, not copied."""
    config: Any = cast("Any", type(model.config)).from_dict(
        {**model.config.to_dict(), **_named(facts, classes)}
    )
    config.architectures = [cls.__name__]
    config.attn_implementation = model.config._attn_implementation
    cast("Any", torch).manual_seed(seed)
    made = cls._from_config(config, dtype=next(model.parameters()).dtype)
    body: Mapping[str, Any] = model.base_model.state_dict()
    if made.base_model is made:
        raise ModelStateError(f"{cls.__name__} has no body apart from its head")
    loaded = made.base_model.load_state_dict(body, strict=False, assign=True)
    made.tie_weights()
    kept = {id(p) for _, p in named_parameters(made.base_model)}
    prefix = made.base_model_prefix
    missing = {f"{prefix}.{name}" for name in loaded.missing_keys}
    fresh = tuple(
        name for name, p in named_parameters(made) if id(p) not in kept or name in missing
    )
    _name_classes(made, facts, classes)
    return Headed(made, fresh)


def _name_classes(model: Any, facts: Facts, classes: int | None) -> None:
    """Write into the configuration what the classes are called, and what padding is."""
    for key, value in _named(facts, classes).items():
        setattr(model.config, key, value)
    if facts.tokenizer is not None:
        # What classifies the last token of a text has to know where the padding begins.
        pad = facts.tokenizer.eos if facts.tokenizer.pad is None else facts.tokenizer.pad
        model.config.pad_token_id = pad


def _named(facts: Facts, classes: int | None) -> dict[str, Any]:
    """What the classes are called, in the words of a transformers configuration."""
    if classes is None:
        return {}
    names = facts.names or tuple(f"LABEL_{index}" for index in range(classes))
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _class_for(model: Any, objective: str) -> str | None:
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    found: object = getattr(auto, _TABLES[objective]).get(model.config.model_type)
    if isinstance(found, tuple | list):
        return cast("Sequence[str]", found)[0]
    return cast("str | None", found)


def _has_logits(model: Any) -> bool:
    return model.base_model is not model


def _is_transformers(model: nn.Module) -> bool:
    return installed("transformers") and isinstance(model, require("transformers").PreTrainedModel)


def _check_stock(model: nn.Module) -> None:
    if record_of(model) is not None:
        raise ModelStateError(
            f"the {type(model).__name__} was rewritten already: its head cannot be replaced",
            hint="start from the stock model and give all rules in `rules`, or keep: model.head",
        )
