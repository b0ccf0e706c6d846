"""``peft``: an adapter as the folder that ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from torch import Tensor, nn

from surgery import adapters
from surgery.errors import ExportError, ModelStateError
from surgery.exporting.agreement import Agreement, agreement, outputs
from surgery.exporting.base import Format
from surgery.interchange.folder import CONFIG, PREFIX, WEIGHTS
from surgery.interchange.layers import layers_of, the_adapter, why_not_low_rank
from surgery.interchange.writing import in_peft
from surgery.record import Record, record_of
from surgery.rules.strict import options
from surgery.sources import Example
from surgery.verification.baseline import undone

if TYPE_CHECKING:
    from peft import PeftConfig

#: What libraries raise where they cannot load something, or run what they loaded.
FAILURES = (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)


@options
class Peft(Format):
    """``adapter_config.json`` and ``adapter_model.safetensors``, for the stock model's weights.

    LoRA, rsLoRA, DoRA and every method that comes down to a pair of factors (PiSSA, OLoRA, NoRA,
    RefLoRA, LoRA-Pro, AltLoRA, ...). One whose start changed the weight is written with the
    factors of its start beside those of now, at twice the rank. Slices of a fused weight are
    written as the one pair they are together, of the sum of their ranks. A method that added to
    the weight while it trained (ScaLoRA) does not fit; export it merged.

    Args:
        adapter: Name of the adapter; by default the one that is active, with its share.
        trained: Whether stock parameters that require gradients are written too: as
            ``modules_to_save``, and those that are biases of adapted layers as such.
        task: PEFT's task type, such as ``CAUSAL_LM``; by default that of transformers' causal
            and sequence-to-sequence language models, and none for others.
    """

    name: ClassVar[str] = "peft"

    adapter: str | None = None
    trained: bool = True
    task: (
        Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"] | None
    ) = None

    def misfit(self, model: nn.Module) -> str | None:
        """Why a model is no stock model with an adapter of low rank, or None."""
        if find_spec("peft") is None:
            return "peft is not installed (pip install model-surgery[export])"
        return why_not_low_rank(model)

    def write(self, model: nn.Module, work: Path, example: Example) -> None:
        """Write the configuration and the tensors."""
        from peft import LoraConfig
        from safetensors import torch as safetensors

        name, share = the_adapter(model, self.adapter)
        found = in_peft(model, layers_of(model, name, share), trained=self.trained)
        config = LoraConfig(
            **found.fields,
            task_type=self.task or _task(model),
            base_model_name_or_path=_base(model),
        )
        _write_config(config, work)
        tensors = {PREFIX + key: tensor for key, tensor in found.tensors.items()}
        cast("Any", safetensors).save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})

    def check(self, model: nn.Module, written: Path, example: Example) -> Agreement:
        """Load it with PEFT beside the model as it was, and compare outputs."""
        name, share = the_adapter(model, self.adapter)
        found = _by_peft(stock(model), written, example)
        with adapters.using(model, {name: share}):
            expected = outputs(model, example)
        consumer = f"PeftModel.from_pretrained of peft {version('peft')}"
        return agreement(consumer, [("as given", expected, found)])

    def versions(self) -> dict[str, str]:
        """The version of PEFT."""
        return {"peft": version("peft")}


def stock(model: nn.Module) -> nn.Module:
    """The model as it was before it was rewritten, sharing the weights that are as they were.

    Raises:
        ExportError: it cannot be had any more.
    """
    try:
        return undone(model, record_of(model) or Record()).model.eval()
    except ModelStateError as error:
        raise ExportError(
            f"the adapter cannot be checked beside the stock model: {error.message}",
            hint="apply with keep_base: memory or source; or export with format='merged'",
        ) from error


def _by_peft(model: nn.Module, folder: Path, example: Example) -> dict[str, Tensor]:
    """What the stock model returns with the adapter as PEFT loads it.

    Raises:
        ExportError: PEFT does not load or run it.
    """
    from peft import PeftModel

    try:
        with quiet():
            loaded = cast("Any", PeftModel).from_pretrained(model, str(folder))
            return outputs(cast("nn.Module", loaded).eval(), example)
    except FAILURES as error:
        raise ExportError(
            f"peft {version('peft')} does not load or run the adapter: "
            f"{type(error).__name__}: {error}",
            hint="leave that layer out of the adapter, or export with format='merged'",
        ) from error


def _write_config(config: PeftConfig, work: Path) -> None:
    """Write it as PEFT does, with the sets in it in order."""
    with quiet():
        cast("Any", config).save_pretrained(str(work))
    path = work / CONFIG
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "target_parameters"):
        if isinstance(data[key], list):
            data[key] = sorted(data[key])
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def quiet() -> Generator[None]:
    """PEFT warns of what its users may not have meant, such as tied layers; here it is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
