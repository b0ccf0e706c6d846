"""Fine-tuning on two gloo ranks: DDP and FSDP2 give the curve of one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgery.train.finetune.run import finetune
from tests.train import parts
from tests.train.finetune import tiny
from tests.train.tiny import log, losses

#: Sums of two ranks are added in another order, which eight steps of Adam grow.
TOLERANCE = 1e-4
METHODS = {"ddp": "reflora", "fsdp2": "reflora"}


def overrides(parallel: str) -> tuple[str, ...]:
    return (f'train.parallel="{parallel}"', "train.clip=1.0", "train.accumulate=2")


def train(place: Path, parallel: str, out: Path) -> None:
    """One rank of a run."""
    rules = tiny.lowrank(METHODS[parallel], options={"warmup": 2})
    finetune(tiny.classify(place, *overrides(parallel), rules=rules), out=out)


@pytest.mark.parametrize("parallel", METHODS)
def test_two_ranks_give_the_curve_of_one(parallel: str, tmp_path: Path):
    place = tmp_path / "parts"
    tiny.classify(place)
    train(place, parallel, tmp_path / "alone")
    both = tmp_path / "both"
    assert parts.finish(parts.start_ranks(2, train, place, parallel, both)) == [0, 0]
    assert losses(both) == pytest.approx(losses(tmp_path / "alone"), rel=TOLERANCE)
    ours, theirs = (
        load_file(out / "model" / "model.safetensors") for out in (both, tmp_path / "alone")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-3, msg=name)
    # A short last batch is filled up for the second rank; the evaluation does not count that.
    for measure in ("loss", "accuracy"):
        one, other = (log(out, "evaluation")[-1][measure] for out in (both, tmp_path / "alone"))
        assert one == pytest.approx(other, rel=TOLERANCE), measure
    state = json.loads((both / "checkpoints" / "step-000008" / "state.json").read_text())
    assert (state["ranks"], state["sharded"]) == (2, parallel == "fsdp2")
