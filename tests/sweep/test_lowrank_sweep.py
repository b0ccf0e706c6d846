"""The checks of the sweep on a handful of its models; ``make sweep`` runs them on all."""

from __future__ import annotations

import pytest

from tests.sweep.lowrank_sweep import examine
from tests.sweep.models import CASES

pytestmark = [
    # torchao and diffusers announce their own changes while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FAST = [name for name, case in CASES.items() if case.fast]


def test_the_handful_has_models_of_each_library() -> None:
    assert {CASES[name].library for name in FAST} == {"timm", "transformers", "diffusers"}


@pytest.mark.parametrize("name", FAST)
def test_low_rank_adapters_on_an_unknown_model(name: str) -> None:
    result = examine(CASES[name], roles=False)
    assert result.outcome
    assert {check: cause for check, cause in result.outcome.items() if cause != "ok"} == {}
