"""Checkpoints of which some modules are quantised: packed values, and scales beside them."""

from __future__ import annotations

from surgery.checkpoints.names import KeyMap
from surgery.checkpoints.sharded import Checkpoint, Located
from surgery.errors import CheckpointError
from surgery.table import some

#: What stands beside, or in the place of, a weight in the formats that transformers reads: block
#: scales of fp8, GPTQ and AWQ, compressed-tensors, bitsandbytes.
_COMPANIONS = {
    "weight_scale_inv": "fp8 with block scales",
    "weight_scale": "scaled integers or fp8",
    "input_scale": "scaled integers or fp8",
    "weight_zero_point": "scaled integers",
    "weight_packed": "packed integers",
    "weight_shape": "packed integers",
    "weight_blocks": "MXFP4",
    "weight_scales": "MXFP4",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "scales": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
}


class Quantised:
    """Which modules of a checkpoint are quantised.

    Args:
        checkpoint: The source.
        declared: Whether its configuration says that it is quantised.
    """

    def __init__(self, checkpoint: Checkpoint, *, declared: bool) -> None:
        self._tensors = checkpoint.tensors
        self._modules: dict[str, str] = {}
        for key, located in checkpoint.tensors.items():
            path, _, last = key.rpartition(".")
            if not _is_plain(located):
                self._modules.setdefault(path, str(located.slot.dtype).removeprefix("torch."))
            elif declared and last in _COMPANIONS:
                self._modules[path] = _COMPANIONS[last]

    def __bool__(self) -> bool:
        return bool(self._modules)

    def format_of(self, key: str) -> str | None:
        """How the module of a key is quantised; None if it is not."""
        if (found := self._modules.get(key.rpartition(".")[0])) is not None:
            return found
        # bitsandbytes: P.weight.absmax belongs to P.weight.
        return self._modules.get(key)

    def check(self, names: KeyMap) -> None:
        """Raise unless the model and the checkpoint have the same names but for what is quantised.

        Raises:
            CheckpointError: naming the first that one of both lacks.
        """
        unknown = [key for key in names.unknown if self.format_of(key) is None]
        missing = [name for name in names.missing if self.format_of(name) is None]
        if unknown or missing:
            parts = [f"the model has no place for {some(unknown)}"] if unknown else []
            parts += [f"the model needs {some(missing)}, which is not there"] if missing else []
            raise CheckpointError(
                f"{names.label} does not fit: {'; '.join(parts)}",
                hint="convert the checkpoint of the architecture that its config.json names",
            )


def _is_plain(located: Located) -> bool:
    """Whether the values of a tensor mean what they say, without scales beside them."""
    dtype = located.slot.dtype
    return not (dtype.is_floating_point and dtype.itemsize == 1)
