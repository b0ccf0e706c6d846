"""Adapters in the formats of other libraries, in and out."""

from surgery.interchange.loading import load_adapter

__all__ = ["load_adapter"]
