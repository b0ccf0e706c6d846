"""A causal language model as a function of tokens and the keys and values of earlier tokens."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.capture.graft import stock_class
from surgery.errors import ExportError
from surgery.exporting.calls import Outputs, TensorFunction, takes
from surgery.sources import Example

_INPUTS = ("input_ids", "attention_mask", "past_key_values")


class CachedDecoder(TensorFunction):
    """Calls a decoder with the keys and values of earlier tokens and returns the longer ones.

    The inputs are ``input_ids`` (batch, length), ``attention_mask`` (batch, past + length) and
    for each layer keys and values (batch, heads, past, head_dim). The outputs are ``logits``
    (batch, length, vocabulary) and ``present.N.key`` and ``present.N.value``
    (batch, heads, past + length, head_dim).

    Args:
        model: A causal language model of transformers whose cache grows by one entry per token.
        example: A call of this function, from ``decoding_calls``.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__(model, example, list(example.kwargs))
        self.signed()

    def compute(self, given: Sequence[Tensor]) -> Outputs:
        """Some tokens after those in the cache."""
        from transformers import DynamicCache

        ids, mask, *past = given
        output: Any = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=DynamicCache([*zip(past[::2], past[1::2], strict=True)]),
            use_cache=True,
        )
        found: Outputs = {"logits": output.logits}
        for index, layer in enumerate(output.past_key_values.layers):
            found[f"present.{index}.key"] = layer.keys
            found[f"present.{index}.value"] = layer.values
        return found


def dotted(name: str) -> str:
    """An input's name as the tools around ONNX expect it of a decoder."""
    return re.sub(r"^past_key_values_(\d+)_(key|value)$", r"past_key_values.\1.\2", name)


def dimensions(example: Example) -> dict[int, dict[int, str]]:
    """Which dimensions of which tensors of a call may vary; see ``dynamic_dimensions``."""
    found: dict[int, dict[int, str]] = {}
    for name, tensor in example.kwargs.items():
        if name == "input_ids":
            found[id(tensor)] = {0: "batch", 1: "length"}
        elif name == "attention_mask":
            found[id(tensor)] = {0: "batch", 1: "total"}
        else:
            found[id(tensor)] = {0: "batch", 2: "past"}
    return found


def misfit(model: nn.Module) -> str | None:
    """Why a model is no decoder with a cache, or None."""
    cls = stock_class(model)
    if importlib.util.find_spec("transformers") is None:
        return "a cache is one of transformers, which is not installed"
    missing = [name for name in (*_INPUTS, "use_cache") if not takes(model, name)]
    if missing:
        return f"the forward of {cls.__name__} takes no {missing[0]!r}, so there is no cache"
    if bool(cast("Any", model).config.is_encoder_decoder):
        return "the cache of a model with an encoder and a decoder is not supported"
    return None


def decoding_calls(model: nn.Module, example: Example) -> list[tuple[str, Example]]:
    """Calls of ``CachedDecoder`` made of one call of the model: the first is the one to trace.

    Some tokens after others; all tokens at once after none; one token after all others.

    Args:
        model: A decoder.
        example: With ``input_ids`` (batch, length) and ``attention_mask`` of the same shape.

    Raises:
        ExportError: the example does not have them, or the cache is not one that grows.
    """
    ids, mask = example.kwargs.get("input_ids"), example.kwargs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 4:
        raise ExportError(
            "a decoder with a cache is exported from an example with input_ids (batch, length) "
            "of four tokens or more",
            hint="pass example={'input_ids': tokens}",
        )
    mask = torch.ones_like(ids) if mask is None else mask
    if ids.shape[0] == 1:
        ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
    some = ids.shape[1] // 2
    return [
        (f"{ids.shape[1] - some} tokens after {some}", _step(model, ids, mask, some)),
        (f"{ids.shape[1]} tokens after 0, batch 1", _step(model, ids[:1], mask[:1], 0)),
        (f"1 token after {ids.shape[1] - 1}", _step(model, ids, mask, ids.shape[1] - 1)),
    ]


def _step(model: nn.Module, ids: Tensor, mask: Tensor, past: int) -> Example:
    # One token at least is needed to know the layers; none of it is kept where past is 0.
    first = max(past, 1)
    with torch.no_grad():
        output: Any = model(
            input_ids=ids[:, :first], attention_mask=mask[:, :first], use_cache=True
        )
    call: dict[str, Any] = {"input_ids": ids[:, past:], "attention_mask": mask}
    for index, layer in enumerate(output.past_key_values.layers):
        keys, values = _layer(layer, past)
        call[f"past_key_values_{index}_key"] = keys
        call[f"past_key_values_{index}_value"] = values
    return Example((), call)


def _layer(layer: Any, past: int) -> tuple[Tensor, Tensor]:
    from transformers.cache_utils import DynamicLayer

    if type(layer) is not DynamicLayer:
        raise ExportError(
            f"a cache layer of the model is a {type(layer).__name__}; only caches that grow by "
            "one entry per token can be exported",
            hint="export without a cache: -O cache=false",
        )
    keys, values = cast("Tensor", layer.keys), cast("Tensor", layer.values)
    return keys[:, :, :past].clone(), values[:, :, :past].clone()
