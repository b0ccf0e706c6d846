"""``peft``: an adapter as the folder that ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from torch import nn

from surgery.exporting.beside import BesideStock
from surgery.interchange.layers import why_not_low_rank
from surgery.interchange.peft_folder import write_peft
from surgery.rules.strict import options
from surgery.sources import Example


@options
class Peft(BesideStock):
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
    package: ClassVar[str] = "peft"
    loader: ClassVar[str] = "PeftModel.from_pretrained"

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

    def loaded(self, model: nn.Module, written: Path) -> nn.Module:
        """With ``PeftModel.from_pretrained``."""
        from peft import PeftModel

        return cast("nn.Module", cast("Any", PeftModel).from_pretrained(model, str(written)))
