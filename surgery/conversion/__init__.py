"""Checkpoints larger than memory: rewritten, merged, cast and cut as a stream."""

from surgery.conversion.run import Converted, convert

__all__ = ["Converted", "convert"]
