"""``diffusers_lora``: an adapter as the file that ``load_lora_weights`` of a pipeline reads."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn

from surgery.capture.graft import stock_class
from surgery.errors import ExportError
from surgery.exporting.beside import BesideStock
from surgery.interchange.folder import DIFFUSERS_WEIGHTS, metadata_of
from surgery.interchange.layers import layers_of, the_adapter, why_not_low_rank
from surgery.interchange.writing import in_peft
from surgery.rules.strict import options
from surgery.sources import Example
from surgery.sources.libraries import library_of


@options
class DiffusersLora(BesideStock):
    """``pytorch_lora_weights.safetensors`` for the UNet or the transformer of a pipeline.

    The tensors are those of the format ``peft`` under the name of the pipeline's component, with
    PEFT's configuration in the header, so that ranks and scalings come back exactly.

    Args:
        adapter: Name of the adapter; by default the one that is active, with its share.
        prefix: Name of the component in the pipeline; by default ``unet`` for a UNet, else
            ``transformer``.
    """

    name: ClassVar[str] = "diffusers_lora"
    package: ClassVar[str] = "diffusers"
    loader: ClassVar[str] = "load_lora_adapter"

    adapter: str | None = None
    prefix: str | None = None

    def misfit(self, model: nn.Module) -> str | None:
        """Why a model is no component of diffusers with an adapter of low rank, or None."""
        if library_of(stock_class(model)) != "diffusers":
            return "its class is not one of diffusers"
        if find_spec("peft") is None:
            return "diffusers needs peft, which is not installed (pip install peft)"
        from diffusers.loaders.peft import PeftAdapterMixin

        if not issubclass(stock_class(model), PeftAdapterMixin):
            return (
                f"diffusers loads no adapters into a {stock_class(model).__name__}; the formats "
                "peft and merged remain"
            )
        return why_not_low_rank(model)

    def write(self, model: nn.Module, work: Path, example: Example) -> None:
        """Write the file."""
        from peft import LoraConfig
        from safetensors import torch as safetensors

        name, share = the_adapter(model, self.adapter)
        found = in_peft(model, layers_of(model, name, share), trained=True)
        _refuse_more(found.fields)
        config = cast("dict[str, Any]", LoraConfig(**found.fields).to_dict())
        told = {
            k: sorted(cast("set[str]", v)) if isinstance(v, set) else v for k, v in config.items()
        }
        prefix = self._prefix(model)
        cast("Any", safetensors).save_file(
            {f"{prefix}.{key}": tensor for key, tensor in found.tensors.items()},
            work / DIFFUSERS_WEIGHTS,
            metadata=metadata_of(told, prefix),
        )

    def loaded(self, model: nn.Module, written: Path) -> nn.Module:
        """With the model's own ``load_lora_adapter``."""
        cast("Any", model).load_lora_adapter(
            str(written), prefix=self._prefix(model), weight_name=DIFFUSERS_WEIGHTS
        )
        return model

    def _prefix(self, model: nn.Module) -> str:
        from diffusers.loaders.unet import UNet2DConditionLoadersMixin

        if self.prefix is not None:
            return self.prefix
        unet = issubclass(stock_class(model), UNet2DConditionLoadersMixin)
        return "unet" if unet else "transformer"


def _refuse_more(fields: dict[str, Any]) -> None:
    """Raise where PEFT would need more than factors of layers.

    Raises:
        ExportError: parameters are adapted, or stock weights were trained along.
    """
    more = {
        "target_parameters": "adapters of parameters that are no layer's weight",
        "modules_to_save": "stock weights that were trained along",
    }
    for key, what in more.items():
        if fields.get(key):
            raise ExportError(
                f"{fields[key][0]}: diffusers' files hold no {what}",
                hint="format='peft' holds them, and format='merged' writes the whole model",
            )
    if fields["bias"] != "none":
        raise ExportError(
            "biases were trained along, which diffusers' files do not hold",
            hint="format='peft' holds them, and format='merged' writes the whole model",
        )
