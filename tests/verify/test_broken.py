"""Rewrites that do not keep their promise: each is caught, with the right place named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.rules import Path, Rule
from surgery.verification import Report, Row
from tests import zoo
from tests.verify.rewrites import Graft, Rename


class Counting(nn.Linear):
    """A linear layer that counts its calls in a buffer."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 8)
        self.two = Counting(8, 8)
        self.three = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.two(self.one(x).relu()).relu()
        return {"hidden": hidden, "logits": self.three(hidden)}


def check(rewrite: Any, site: str) -> Report:
    model = zoo.perturb(Net()).eval()
    surgery.apply(model, Rule(rewrite, where=Path(site)))
    return surgery.verify(model, torch.randn(2, 6))


def bare(mixin: str) -> Graft:
    return Graft(mixin=mixin, adds=None)


EVAL, TRAIN = "(eval, given shape)", "(train, given shape)"

# rewrite, site → the check that must fail, where, and what is said
CASES: dict[str, tuple[Any, str, str, str, str]] = {
    "output": (bare("Louder"), "three", f"outputs {EVAL}", "logits[", "2 tensors"),
    "first output": (bare("Louder"), "two", f"outputs {EVAL}", "", "2 tensors"),
    "train mode only": (bare("LouderWhileTraining"), "three", f"outputs {TRAIN}", "logits[", ""),
    "larger batches only": (
        bare("LouderInLargerBatches"), "three", "outputs (eval, shape (3, 6))", "logits[", "",
    ),
    "lost gradient": (
        bare("Detached"), "three", f"gradients {EVAL}", "three.weight",
        "1 of 6 parameters lost their gradient",
    ),
    "renamed key": (Rename(), "one", "state-dict keys", "one.weight", "1 stock key lost"),
    "buffer": (
        bare("Forgetful"), "two", f"buffers after the call {TRAIN}", "two.calls[]", "1 buffer",
    ),
    "loose insertion": (
        Graft(mixin="Doubtful"), "two", "inserted tensors reached by gradient", "two.shift",
        "1 of 1 take no part",
    ),
    "NaN": (bare("Poisoned"), "three", f"finite outputs {EVAL}", "logits[", "1 values are NaN"),
    "exception": (
        bare("Failing"), "two", f"outputs {EVAL}", "forward",
        "ValueError: this layer cannot run any more",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_caught_with_its_place(case: str) -> None:
    rewrite, site, name, where, said = CASES[case]
    report = check(rewrite, site)
    assert not report.ok
    broken = {row.check: row for row in report.broken}
    assert name in broken, str(report)
    assert broken[name].where.startswith(where)
    assert said in broken[name].detail


def test_only_the_wrong_mode_is_broken() -> None:
    report = check(bare("LouderWhileTraining"), "three")
    assert {row.check for row in report.broken} == {
        "outputs (train, given shape)",
        "outputs (train, shape (3, 6))",
        "gradients (train, given shape)",
    }


def test_one_loose_insertion_among_many_is_found() -> None:
    model = zoo.perturb(Net()).eval()
    surgery.apply(
        model,
        [
            Rule(Graft(), where=Path("one"), id="a"),
            Rule(Graft(mixin="Doubtful"), where=Path("two"), id="b"),
            Rule(Graft(), where=Path("three"), id="c"),
        ],
    )
    (broken,) = surgery.verify(model, torch.randn(2, 6)).broken
    assert broken == Row(
        "inserted tensors reached by gradient",
        "broken",
        where="two.shift",
        detail="1 of 3 take no part in the forward",
    )


def test_an_inserted_tensor_that_is_gone_is_named() -> None:
    model = zoo.perturb(Net()).eval()
    surgery.apply(model, Rule(Graft(), where=Path("one")))
    model.one.shift = None
    (broken, *_) = surgery.verify(model, torch.randn(2, 6), baseline=Net()).broken
    assert broken.check == "state-dict keys" or broken.where == "one.shift"
    rows = surgery.verify(model, torch.randn(2, 6), baseline=Net()).broken
    assert ("edit log", "one.shift") in [(row.check, row.where) for row in rows]


def test_a_graft_taken_off_behind_the_log_is_named() -> None:
    model = zoo.perturb(Net()).eval()
    surgery.apply(model, Rule(Graft(), where=Path("one")))
    model.one.__class__ = nn.Linear
    report = surgery.verify(model, torch.randn(2, 6), baseline=Net())
    rows = {row.check: row for row in report.broken}
    assert rows["edit log"].where == "one"
    assert rows["edit log"].detail == "Linear, not Linear + Shifted"


@pytest.mark.parametrize(
    ("spoil", "where", "said"),
    [
        (
            lambda m: m.two.weight[1, 3:5].fill_(torch.nan),
            "two.weight",
            "2 of 64 values, first at [1, 3]",
        ),
        (lambda m: m.one.bias[4:5].fill_(torch.inf), "one.bias", "1 of 8 values, first at [4]"),
        (lambda m: m.two.calls.fill_(torch.nan), "two.calls", "1 of 1 values, first at []"),
    ],
)
def test_weights_that_are_not_finite_are_named(spoil: Any, where: str, said: str) -> None:
    model = zoo.perturb(Net()).eval()
    surgery.apply(model, Rule(Graft()))
    with torch.no_grad():
        spoil(model)
    report = surgery.verify(model, torch.randn(2, 6))
    rows = {row.check: row for row in report.broken}
    assert rows["finite weights"].where == where
    assert rows["finite weights"].detail == f"NaN or infinite: {said}"


def test_an_infinite_mask_is_no_fault() -> None:
    model = zoo.perturb(Net()).eval()
    model.register_buffer("mask", torch.full((2, 2), -torch.inf))
    surgery.apply(model, Rule(Graft()))
    assert surgery.verify(model, torch.randn(2, 6)).ok


def test_nan_outputs_of_the_original_are_its_own() -> None:
    class Divides(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = super().forward(x)
            return {**out, "share": out["logits"] / (0 * out["logits"])}

    model = zoo.perturb(Divides()).eval()
    surgery.apply(model, Rule(Graft()))
    report = surgery.verify(model, torch.randn(2, 6))
    assert report.ok, str(report)
    rows = {row.check: row for row in report.rows}
    assert rows["finite outputs (eval, given shape)"].result == "info"
    assert "the original has 8" in rows["finite outputs (eval, given shape)"].detail
