"""What the formats for an adapter alone have in common: their program loads it beside the stock."""

from __future__ import annotations

from abc import abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from torch import nn

from surgery import adapters
from surgery.errors import ExportError, ModelStateError
from surgery.exporting.agreement import Agreement, agreement, outputs
from surgery.exporting.base import Format
from surgery.interchange.layers import the_adapter
from surgery.interchange.peft_folder import quiet
from surgery.record import Record, record_of
from surgery.sources import Example
from surgery.verification.baseline import undone

#: What libraries raise where they cannot load something, or run what they loaded.
FAILURES = (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)


class BesideStock(Format):
    """A format that holds an adapter without the weights it is for.

    Attributes:
        package: The package that loads it.
        loader: What of the package does, for messages.
        adapter: An option of every such format: name of the adapter; by default the one that is
            active, with its share.
    """

    package: ClassVar[str]
    loader: ClassVar[str]

    adapter: str | None

    @abstractmethod
    def loaded(self, model: nn.Module, written: Path) -> nn.Module:
        """A stock model with the adapter, as the package puts it in; the model may be changed."""

    def check(self, model: nn.Module, written: Path, example: Example) -> Agreement:
        """Load it with its package beside the model as it was, and compare outputs."""
        name, share = the_adapter(model, self.adapter)
        before = _stock(model)
        try:
            with quiet():
                found = outputs(self.loaded(before, written).eval(), example)
        except FAILURES as error:
            raise ExportError(
                f"{self.package} {version(self.package)} does not load or run the adapter: "
                f"{type(error).__name__}: {error}",
                hint="leave that layer out of the adapter, or export with format='merged'",
            ) from error
        with adapters.using(model, {name: share}):
            expected = outputs(model, example)
        consumer = f"{self.loader} of {self.package} {version(self.package)}"
        return agreement(consumer, [("as given", expected, found)])

    def versions(self) -> dict[str, str]:
        """The version of PEFT, whose layers every loader puts in."""
        return {"peft": version("peft")}


def _stock(model: nn.Module) -> nn.Module:
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
