"""Save rewritten models, and restore them without the original weights at hand."""

from surgery.checkpoints.loading import load_weights, materialize, stock_weights
from surgery.checkpoints.names import KeyMap, keymap
from surgery.checkpoints.restoring import restore
from surgery.checkpoints.saving import save

__all__ = ["KeyMap", "keymap", "load_weights", "materialize", "restore", "save", "stock_weights"]
