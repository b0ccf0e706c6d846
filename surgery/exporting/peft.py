"""``peft``: an adapter as the folder that ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from surgery import adapters
from surgery.errors import ExportError, ModelStateError
from surgery.exporting.agreement import Agreement, agreement, outputs
from surgery.exporting.base import Format
from surgery.interchange.layers import the_adapter, why_not_low_rank
from surgery.interchange.peft_folder import quiet, write_peft
from surgery.record import Record, record_of
from surgery.rules.strict import options
from surgery.sources import Example
from surgery.verification.baseline import undone

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
        write_peft(model, work, adapter=self.adapter, trained=self.trained, task=self.task)

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
