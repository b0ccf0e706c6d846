"""The global random generators of this process: seeded at the start, saved, put back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch


def seed_all(seed: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on each rank differently."""
    own = (seed * 1_000_003 + rank) % 2**32
    random.seed(own)
    np.random.seed(own)  # noqa: NPY002 - models draw from the global generator
    cast("Any", torch).manual_seed(own)


def state() -> dict[str, Any]:
    """The state of all generators, as ``pack`` takes it."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - as above
    words: list[int] = numpy["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": words, "pos": int(numpy["state"]["pos"])}},
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }


def restore(saved: Mapping[str, Any]) -> None:
    """Put all generators into a saved state."""
    random.setstate(saved["python"])
    words = np.asarray(saved["numpy"]["state"]["key"], dtype=np.uint32)
    numpy = {**saved["numpy"], "state": {**saved["numpy"]["state"], "key": words}}
    np.random.set_state(numpy)  # noqa: NPY002 - as above
    torch.set_rng_state(saved["torch"])
    # On another number of devices their generators go on from their seeds.
    if len(saved["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(saved["cuda"])
