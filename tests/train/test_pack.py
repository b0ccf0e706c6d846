"""State as tensors and JSON: what a checkpoint says is taken for what a stranger wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.errors import CheckpointError
from surgery.train import checkpoints
from surgery.train.pack import pack, unpack


def test_round_trip() -> None:
    inner = {"lr": 0.1, "betas": (0.9, 0.99), "m": torch.ones(2)}
    state = {"step": 3, 0: inner, "no": [None, True]}
    packed, tensors = pack(state, "optimizer")
    found = unpack(json.loads(json.dumps(packed)), tensors)
    moment = found[0].pop("m")
    assert torch.equal(moment, inner.pop("m"))
    assert found == state


@pytest.mark.parametrize(
    "packed",
    [
        {},
        {"tensor": "b"},
        {"tensor": ["a"]},
        {"tensor": "a", "tuple": []},
        {"tuple": 3},
        {"pairs": [["a"]]},
        {"pairs": [[["a"], 1]]},
        {"pairs": {"a": 1}},
        {"class": "os.system"},
        [{"tuple": [{"tensor": "b"}]}],
    ],
)
def test_state_that_stands_for_nothing(packed: Any) -> None:
    with pytest.raises(CheckpointError, match="a checkpoint's state is damaged"):
        unpack(packed, {"a": torch.ones(1)})


def test_a_run_folder_that_was_tampered_with(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "state.json").write_text('{"format": 1, "files": {"../secret": 2}}')
    assert checkpoints.complete(tmp_path) == []
    with pytest.raises(CheckpointError, match="is damaged: it has no 'step'"):
        checkpoints.read_progress(folder)
    for name in ("model.json", "model.safetensors"):
        (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match="outside of its folder"):
        checkpoints.read_json(folder / "model.json")
    with pytest.raises(CheckpointError, match="outside of its folder"):
        checkpoints.read_tensors(folder / "model.safetensors")
