"""Readable code for every family of the survival table, rewired and with adapters not merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery.exporting import outputs
from tests.exporting import models
from tests.exporting.together import Together
from tests.survival.models import SUBJECTS, Subject

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*autocast:UserWarning"
)

FORMATS = {"transformers": "transformers", "diffusers": "diffusers", "timm": "python"}


def rewritten(subject: Subject) -> nn.Module:
    """The model with learned shortcuts, and adapters at every weight that takes one."""
    model = subject.build()
    example = subject.example()
    shortcuts = surgery.Rule(surgery.Shortcuts(), where=surgery.Stack("all"))
    model = models.randomise(surgery.apply(model, shortcuts, example=example))
    surgery.apply(model, surgery.Rule(surgery.LowRank(rank=2)), example=example)
    return models.stirred(model)


@pytest.mark.parametrize("library", FORMATS)
def test_families(tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = [each for each in SUBJECTS if each.library == library]
    checked = tmp_path / "checked"
    checked.mkdir()
    together = Together(checked, monkeypatch)
    for subject in subjects:
        model, example = rewritten(subject), subject.example(quiet=True)
        form = FORMATS[library]
        surgery.export(model, tmp_path / subject.name, format=form, example=example)
        far = outputs(subject.build(), example)
        wanted = outputs(model, example)
        assert any(not torch.allclose(far[name], wanted[name], atol=1e-2) for name in wanted)
    found = dict(zip([each.name for each in subjects], together.compare(), strict=True))
    assert {name for name, one in found.items() if one.deviation > 1e-5} == set(), found
