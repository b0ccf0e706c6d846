"""``merged``: the stock architecture with the adapters in its weights, as its library saves it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from surgery import adapters
from surgery.capture.graft import stock_class
from surgery.copies import sharing
from surgery.errors import ExportError, ModelStateError
from surgery.exporting.agreement import Agreement, agreement, outputs
from surgery.exporting.base import Format
from surgery.exporting.beside import FAILURES
from surgery.passes.hosts import Place, bank_of, detach
from surgery.passes.lowrank import LowRank
from surgery.passes.payload import places_of
from surgery.record import Edit, Record, record_of, set_record
from surgery.rules.strict import options
from surgery.save_guard import guard, not_baked, to_settle
from surgery.sources import Example
from surgery.sources.libraries import library_of
from surgery.tree import named_parameters
from surgery.verification.baseline import writable

_LIBRARIES = ("transformers", "diffusers", "timm")


@options
class Merged(Format):
    """What ``from_pretrained`` of the stock class loads; of timm, ``create_model``.

    The adapters are added into copies of the weights, the sum formed in float32 at least and
    rounded once; the model keeps its own. Names of files and tensors are those that the library
    gives the stock model. Only the adapted weights are copied.

    Args:
        adapter: Name of the adapter to merge; by default everything that is active, with its
            shares.
    """

    name: ClassVar[str] = "merged"

    adapter: str | None = None

    def misfit(self, model: nn.Module) -> str | None:
        """Why no stock class computes what the model computes, or None."""
        if library_of(stock_class(model)) not in _LIBRARIES:
            return "its class is not one of transformers, diffusers or timm"
        record = record_of(model) or Record()
        lasting = [e for e in not_baked(model, record) if e.pass_name != LowRank.name]
        if lasting:
            way_out = to_settle(lasting[0])
            return (
                f"rule {lasting[0].rule!r} changed {lasting[0].site} ({lasting[0].summary}), which "
                "the stock class does not compute" + (f"; {way_out}" if way_out else "")
            )
        return None

    def write(self, model: nn.Module, work: Path, example: Example) -> None:
        """Merge into a copy, and have its library save it."""
        whole = self._merged(model)
        if library_of(type(whole)) == "timm":
            from timm import models as timm

            cast("Any", timm).save_for_hf(whole, str(work), safe_serialization=True)
        else:
            cast("Any", whole).save_pretrained(str(work))

    def check(self, model: nn.Module, written: Path, example: Example) -> Agreement:
        """Load it with the stock class, and compare names and outputs."""
        loaded, consumer = _loaded(model, written)
        whole = self._merged(model)
        expected, found = whole.state_dict().keys(), loaded.state_dict().keys()
        if expected != found:
            odd = min(expected ^ found)
            side = "lacks" if odd in expected else "has"
            raise ExportError(f"the {type(loaded).__name__} that {consumer} loads {side} {odd}")
        return agreement(
            consumer, [("as given", self._outputs(model, example), outputs(loaded, example))]
        )

    def _outputs(self, model: nn.Module, example: Example) -> Any:
        if self.adapter is None or record_of(model) is None or adapters.merged(model):
            return outputs(model, example)
        with adapters.using(model, self.adapter):
            return outputs(model, example)

    def _merged(self, model: nn.Module) -> nn.Module:
        """A copy of the stock class that shares all weights but the adapted ones."""
        record = record_of(model)
        if record is None:
            return model
        whole = sharing(model, owned=writable(model, record))
        places = [place for edit in record.edits for place in _places(edit)]
        if places:
            self._merge(whole)
        for place in places:
            module = whole.get_submodule(place.path)
            if bank_of(module, place.parameter) is not None:
                detach(module, place)
        guard(whole, [])
        set_record(whole, None)
        return whole

    def _merge(self, whole: nn.Module) -> None:
        already = adapters.merged(whole)
        if already:
            if self.adapter is not None and already != {self.adapter: 1.0}:
                raise ExportError(
                    f"{already} is merged into the weights, and adapter={self.adapter!r} was asked "
                    "for",
                    hint="call surgery.adapters.unmerge(model) first",
                )
            return
        try:
            adapters.merge(whole, self.adapter, keep_base="none")
        except ModelStateError as error:
            raise ExportError(error.message, hint=error.hint) from error


def _places(edit: Edit) -> list[Place]:
    return places_of(edit) if edit.pass_name == LowRank.name else []


def _loaded(model: nn.Module, folder: Path) -> tuple[nn.Module, str]:
    """What the library loads, in eval mode where the model is, and the call in words."""
    cls = stock_class(model)
    library = str(library_of(cls))
    _, first = next(named_parameters(model))
    call = "timm.create_model" if library == "timm" else f"{cls.__name__}.from_pretrained"
    consumer = f"{call} of {library} {version(library)}"
    try:
        loaded = _by_library(cls, library, folder, first.dtype)
    except FAILURES as error:
        raise ExportError(
            f"{consumer} does not load the folder: {type(error).__name__}: {error}",
            hint="please report it with the model and its rules",
        ) from error
    return loaded.to(first.device).eval(), consumer


def _by_library(cls: type, library: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    if library == "timm":
        import timm

        made = cast("Any", timm).create_model(f"local-dir:{folder}", pretrained=True)
        return cast("nn.Module", made).to(dtype)
    told: dict[str, Any] = {"torch_dtype": dtype} if library == "diffusers" else {}
    return cast("nn.Module", cast("Any", cls).from_pretrained(str(folder), **told))
