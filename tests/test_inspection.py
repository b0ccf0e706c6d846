from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

import surgery
from surgery.table import render
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
    assert "no roles and residuals: " in str(found)


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


def test_residuals_are_listed_with_their_place():
    model, example = zoo.build("bert")
    found = surgery.inspect(model, example=example)
    first, second = found.residuals[2:4]
    assert (first.stack, first.layer) == (second.stack, second.layer) == ("encoder.layer", 1)
    assert first.owner == "encoder.layer.1.attention.output"
    assert first.block == "encoder.layer.1.attention"
    assert second.owner == "encoder.layer.1.output"
    assert first.kind == second.kind == "identity"
    assert first.shape == (2, 12, 32)
    assert first.where.rpartition(":")[0].endswith("modeling_bert.py")
    assert {residual.run for residual in found.residuals} == {0}


def test_like_residuals_are_one_row():
    model, example = zoo.build("bert")
    found = surgery.inspect(model, example=example)
    table = render(found.view(), width=100)
    assert "encoder.layer  {0..2}.attention > output" in table
    assert "6 residual additions; runs of one shape: 6 at 2x12x32" in table
    rows = [line for line in table.splitlines() if "identity" in line]
    assert len(rows) == 2
    listed = render(found.view(full=True), width=100)
    assert sum("identity" in line for line in listed.splitlines()) == 6
    assert all(len(line) <= 100 for line in table.splitlines())


def test_runs_are_cut_where_the_state_changes_shape():
    model, example = zoo.build("timm_resnet")
    found = surgery.inspect(model, example=example)
    assert [residual.run for residual in found.residuals] == [0, 0, 1, 1, 2, 3]
    kinds = [residual.kind for residual in found.residuals]
    assert kinds == ["projection", "identity", "projection", "identity", "projection", "projection"]


def test_additions_that_came_close_are_given_with_the_reason():
    model, example = zoo.build("gpt2")
    found = surgery.inspect(model, example=example)
    assert {addition.owner for addition in found.additions} == {
        f"transformer.h.{layer}.mlp.act" for layer in range(3)
    }
    assert "no weight layer" in found.additions[0].reason
    assert "3 other additions that came close" in str(found)
    assert "not residual: transformer.h.{0..2}.mlp.act, activations.py:" in render(
        found.view(full=True)
    )


def test_a_model_without_residuals_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    found = surgery.inspect(model, example=torch.ones(2, 4))
    assert found.residuals == found.additions == ()
    assert "no residual additions" in str(found)


def test_residuals_are_data():
    model, example = zoo.build("timm_resnet")
    data = json.loads(json.dumps(surgery.inspect(model, example=example).to_dict()))
    assert [each["kind"] for each in data["residuals"]][:2] == ["projection", "identity"]
    assert data["residuals"][1]["branches"] == ["layer1_1_bn3"]
