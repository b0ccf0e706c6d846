"""Recipes with mirror maps beside rules that freeze: what adapts, and what a run says of it."""

from __future__ import annotations

import json
from typing import Any

from surgery import mirrors
from surgery.train.adapt.config import AdaptConfig
from surgery.train.adapt.learner import Learner
from surgery.train.adapt.objective import example_of
from surgery.train.adapt.run import Adapting
from tests.train.adapt import tiny


def config(*rules: dict[str, Any], inner: str = "inner.steps=2") -> AdaptConfig:
    recipe = {"version": 1, "recipe": "r", "seed": 0, "rules": list(rules)}
    return tiny.sinusoid(f"rules={json.dumps(recipe)}", inner)


def started(given: AdaptConfig) -> tuple[Learner, list[str]]:
    """The learner of a job, and the notes of the job."""
    job = Adapting(given)
    data = job.data()
    model = job.model(data)
    job.objective(data, model)
    return Learner(given, data.facts, model, example_of(data)), job.notes(model)


def test_duals_adapt_beside_adapters_that_freeze_the_model() -> None:
    """The rule that puts adapters in freezes all that it does not add, but not what is mapped."""
    for order in (1, -1):
        rules = [
            {"id": "lora", "pass": "lowrank", "where": {"type": "Linear"}, "with": {"rank": 1}},
            {"id": "duals", "pass": "mirror", "with": {"parameters": ["bias"]}},
        ][::order]
        learner, notes = started(config(*rules))
        duals = {name for each in mirrors.attached(learner.model) for name in each.parameters}
        assert duals
        assert {name.rpartition(".")[2] for name in duals} == {"bias"}
        assert duals <= set(learner.names.adapted)
        assert not any(name.endswith(".weight") for name in learner.names.adapted)
        assert not any("do not adapt" in text for text in notes)


def test_a_map_over_what_does_not_adapt_is_told() -> None:
    rule = {"id": "duals", "pass": "mirror", "with": {"parameters": ["bias"]}}
    learner, _ = started(config(rule))
    paths = sorted({name.rpartition(".")[0] for name in learner.names.adapted if "bias" in name})
    inner = f"inner.where={json.dumps({'path': paths[-1]})}"
    narrowed, notes = started(config(rule, inner=inner))
    idle = len(mirrors.attached(narrowed.model)) - 1
    assert idle
    assert any(f"{idle} mirror maps are over parameters that do not adapt" in n for n in notes)
