"""What every export format is: a frozen dataclass of options that writes a folder and checks it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from torch import nn

from surgery.exporting.agreement import Agreement
from surgery.sources import Example


class Format(ABC):
    """One export format: its dataclass fields are the options of ``surgery.export``.

    Subclasses are declared with ``surgery.rules.strict.options``, every field with a default, and
    registered in ``surgery.registry.FORMATS``, or by an entry point of the group
    ``surgery.formats``. All work on a *copy* of the model, in eval mode, whose parameters share
    the model's memory: a format that has to change weights makes a copy of its own that owns
    them (``surgery.copies.sharing(model, owned=names)``).

    The model has been called once with the example before ``write``, so that whatever a rewrite
    traces at its first call is traced.

    Attributes:
        name: The name in ``surgery.export(..., format=name)``.
        file: For a format that can be one file: its name in the folder, such as ``model.onnx``.
            A target with the same suffix then becomes that file; any other a folder.
    """

    name: ClassVar[str]
    file: ClassVar[str | None] = None

    @abstractmethod
    def misfit(self, model: nn.Module) -> str | None:
        """The reason why this format cannot hold the model, or None if it seems that it can.

        Looks at the model's structure alone (it may lie on the meta device) and imports nothing
        heavy. A package that is missing is a reason, which names the extra to install.
        """

    @abstractmethod
    def write(self, model: nn.Module, work: Path, example: Example) -> None:
        """Write the export into ``work``, an empty folder, without folders in it.

        Raises:
            ExportError: the model cannot be expressed; says which part and why.
        """

    @abstractmethod
    def check(self, model: nn.Module, written: Path, example: Example) -> Agreement:
        """Load what was written with the program it is for, and compare outputs.

        Args:
            model: The model that was exported.
            written: The folder that ``write`` filled.
            example: A call of the model.
        """

    def versions(self) -> dict[str, str]:
        """Versions of the packages that wrote or read the export, for its provenance."""
        return {}
