"""The folder of an adapter that ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from surgery.interchange.folder import CONFIG, PREFIX, WEIGHTS
from surgery.interchange.layers import layers_of, the_adapter
from surgery.interchange.writing import in_peft

if TYPE_CHECKING:
    from peft import PeftConfig


def write_peft(
    model: nn.Module,
    folder: Path,
    *,
    adapter: str | None = None,
    trained: bool = True,
    task: str | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        model: A model for which ``why_not_low_rank`` is None.
        folder: Where to; it is there already.
        adapter: Name of the adapter; None for the one that is active, with its share.
        trained: Whether stock parameters that require gradients are written too: as
            ``modules_to_save``, and those that are biases of adapted layers as such.
        task: PEFT's task type; by default that of transformers' causal and sequence-to-sequence
            language models, and none for others.

    Raises:
        ExportError: there is no such adapter, or PEFT has no layer that computes the same.
    """
    from peft import LoraConfig
    from safetensors import torch as safetensors

    name, share = the_adapter(model, adapter)
    found = in_peft(model, layers_of(model, name, share), trained=trained)
    config = LoraConfig(
        **found.fields,
        task_type=task or _task(model),
        base_model_name_or_path=_base(model),
    )
    _write_config(config, folder)
    tensors = {PREFIX + key: tensor for key, tensor in found.tensors.items()}
    cast("Any", safetensors).save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@contextmanager
def quiet() -> Generator[None]:
    """PEFT warns of what its users may not have meant, such as tied layers; here it is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _write_config(config: PeftConfig, folder: Path) -> None:
    """Write it as PEFT does, with the sets in it in order."""
    with quiet():
        cast("Any", config).save_pretrained(str(folder))
    path = folder / CONFIG
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "target_parameters"):
        if isinstance(data[key], list):
            data[key] = sorted(data[key])
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _task(model: nn.Module) -> str | None:
    """The task of a language model of transformers that generates."""
    from transformers import GenerationMixin, PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _base(model: nn.Module) -> str | None:
    """Where the stock model came from, as transformers remembers it."""
    from transformers import PreTrainedModel

    return (model.name_or_path or None) if isinstance(model, PreTrainedModel) else None
