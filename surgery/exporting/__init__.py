"""Write a model, rewritten or not, in a format that others read without this library.

One file per format, found by name in ``surgery.registry.FORMATS``; each is verified after it is
written, by loading it with the program it is for and comparing outputs.
"""

from __future__ import annotations

from surgery.exporting.agreement import Agreement, agreement, outputs
from surgery.exporting.base import Format
from surgery.exporting.run import Exported, Fit, export, fits

__all__ = ["Agreement", "Exported", "Fit", "Format", "agreement", "export", "fits", "outputs"]
