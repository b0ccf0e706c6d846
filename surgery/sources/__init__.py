"""Where models come from: timm, diffusers, transformers, the hub, a local folder.

Nothing here imports one of the libraries until a model of it is asked for.
"""

from __future__ import annotations

from surgery.sources.examples import Example, infer_example, variants
from surgery.sources.load import SOURCE_ATTRIBUTE, load, skeleton
from surgery.sources.provenance import describe, rebuild, why_undescribed

__all__ = [
    "SOURCE_ATTRIBUTE",
    "Example",
    "describe",
    "infer_example",
    "load",
    "rebuild",
    "skeleton",
    "variants",
    "why_undescribed",
]
