from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

import surgery
from tests import zoo


class Opaque(nn.Module):
    """Stacked layers in a forward that asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no forward today")


def seen(model: nn.Module, example: Any = None) -> dict[str, surgery.inspection.SiteView]:
    return {site.path: site for site in surgery.inspect(model, example=example).sites}


def test_sites_carry_role_shape_and_place():
    model, example = zoo.build("bert")
    sites = seen(model, example)
    (path,) = (name for name in sites if name.endswith("layer.1.attention.self.query"))
    query = sites[path]
    linear: Any = model.get_submodule(path)
    assert query.type == "Linear"
    assert query.roles == ("attention.q",)
    assert query.shape["in"] == linear.in_features
    assert query.shape["out"] == linear.out_features
    assert query.layer == 1
    assert query.stack is not None
    assert path.startswith(query.stack)


def test_everything_listed_can_be_named_by_a_rule():
    model, example = zoo.build("bert")
    found = surgery.inspect(model, example=example)
    linear = [site for site in found.sites if site.type == "Linear"]
    assert linear
    for site in linear:
        rule = surgery.Rule(surgery.LowRank(rank=1), where=surgery.Path(site.path))
        (edit,) = surgery.plan(model, rule, example=example).edits
        assert edit.site == site.path


def test_inspect_changes_nothing():
    model, example = zoo.build("bert")
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    surgery.inspect(model, example=example)
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(model.named_parameters())
    assert all(
        id(after[name]) == i and torch.equal(after[name], p) for name, (i, p) in before.items()
    )


def test_a_model_that_cannot_be_traced_is_listed_with_the_reason():
    found = surgery.inspect(Opaque(), example=torch.ones(2, 4))
    assert found.untraced is not None
    assert [site.layer for site in found.sites if site.type == "Linear"] == [0, 1, 2]
    assert "no roles: " in str(found)


def test_a_model_without_an_example_is_listed_with_the_reason():
    found = surgery.inspect(nn.Sequential(nn.Linear(4, 4)))
    assert found.untraced is not None
    assert "example" in found.untraced


def test_what_a_rule_made_names_the_rule():
    model, example = zoo.build("bert")
    rule = surgery.Rule(surgery.LowRank(rank=1), where=surgery.Path("**.query"), id="adapters")
    surgery.apply(model, rule, example=example)
    made = {site.created_by for site in surgery.inspect(model, example=example).sites}
    assert made == {None, "adapters"}


def test_the_table_shows_runs_and_the_data_shows_all():
    model, example = zoo.build("bert")
    found = surgery.inspect(model, example=example)
    table = str(found)
    assert "attention.self.query  (" in table
    assert len(table.splitlines()) < len(found.sites)
    data = json.loads(json.dumps(found.to_dict()))
    assert [site["path"] for site in data["sites"]] == [site.path for site in found.sites]
    assert data["untraced"] is None
