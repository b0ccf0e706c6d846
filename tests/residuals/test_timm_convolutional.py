from __future__ import annotations

import pytest

from tests.residuals.expected import CONVOLUTIONAL, Timm


@pytest.mark.parametrize("model", CONVOLUTIONAL, ids=lambda model: model.name)
def test_residuals(model: Timm):
    residuals = model.findings().residuals
    projections = sum(residual.kind == "projection" for residual in residuals)
    assert (len(residuals), projections) == (model.count, model.projections)
