"""Pickle, deepcopy, save and restore."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import surgery
from tests.survival.calls import (
    OUTPUTS,
    Case,
    Notes,
    distance,
    same,
    same_gradients,
    still,
    train,
)
from tests.survival.reference import MARK


def pickled(case: Case) -> Notes:
    """Unpickled here and in another process it computes every bit the same."""
    model = case.model()
    example = case.subject.example()
    wanted = still(model, example)
    same(still(pickle.loads(pickle.dumps(model)), example), wanted, 0)  # noqa: S301  our own bytes
    same(wanted, still(case.reference(model).model, example))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pickle"
        with file.open("wb") as stream:
            pickle.dump((model, example, wanted), stream)
        command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    return {}


ELSEWHERE = """
import pickle, sys, torch
torch.set_num_threads(1)
model, example, wanted = pickle.load(open(sys.argv[1], "rb"))
def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for item in value for t in leaves(item)] if isinstance(value, (list, tuple)) else []
with torch.no_grad():
    torch.manual_seed(0)
    found = leaves(model(*example.args, **example.kwargs))
assert len(found) == len(wanted) and all(map(torch.equal, found, wanted)), "another output"
sum(t.float().sum() for t in leaves(model.train()(*example.args, **example.kwargs))).backward()
silent = [n for n, p in model.named_parameters() if ".shortcuts." in n and p.grad is None]
assert not silent, f"no gradient: {silent}"
"""


def deepcopied(case: Case) -> Notes:
    """A deepcopy computes the same and shares nothing with the original."""
    model = case.model()
    example = case.subject.example()
    before = still(model, example)
    twin = copy.deepcopy(model)
    same(still(twin, example), before, 0)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.003 if MARK in name else 0.02)
    same(still(model, example), before, 0, "the original changed:")
    reference = case.reference(twin)
    _load(reference.model, dict(twin.state_dict()))
    same(still(twin, example), still(reference.model, example))
    moved = max(map(distance, still(twin, example), before))
    assert moved > 100 * OUTPUTS, f"the copy's parameters change its output by {moved:.1e} only"
    return {}


def _load(stock: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what the stock model has of the state of a rewritten one."""
    kept = {name: tensor for name, tensor in state.items() if MARK not in name}
    stock.load_state_dict(kept)


def saved(case: Case) -> Notes:
    """``surgery.save`` and ``surgery.restore`` give every bit back."""
    model = case.model()
    example = case.subject.example()
    with tempfile.TemporaryDirectory() as folder:
        surgery.save(model, Path(folder) / "saved")
        back = surgery.restore(Path(folder) / "saved", model=case.subject.build())
    same(still(back, example), still(model, example), 0)
    same(still(back, example), still(case.reference(model).model, example))
    assert set(back.state_dict()) == set(model.state_dict())
    _, found = train(back.train(), case.subject.example(quiet=True))
    _, wanted = train(model.train(), case.subject.example(quiet=True))
    same_gradients(found, wanted, 0)
    return {}
