"""Planning shows what would be done and changes nothing."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import Layers, LowRank, Path, Recipe, Rule, Type
from surgery.errors import Conflict, ModelStateError, NoMatch, RuleError
from surgery.record import record_of


class Block(nn.Module):
    """One residual block of width 8."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, hidden)
        self.down = nn.Linear(hidden, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def stack(depth: int = 4) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*[Block() for _ in range(depth)])


def lora(*, where: Any = None, id: str = "", **options: Any) -> Rule:  # noqa: A002
    return Rule(LowRank(**{"rank": 2, **options}), where=where, id=id)


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()},
        "classes": [type(module) for module in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    for key in ("classes", "grads", "training", "attributes"):
        assert one[key] == two[key], key
    assert one["tensors"].keys() == two["tensors"].keys()
    for name, (pointer, value) in one["tensors"].items():
        assert pointer == two["tensors"][name][0], name
        assert torch.equal(value, two["tensors"][name][1]), name


def test_plan_changes_nothing_not_even_the_random_generator() -> None:
    model = stack()
    before, random = state(model), torch.get_rng_state()
    surgery.plan(model, lora(where=Type("Linear")))
    assert_same(before, state(model))
    assert torch.equal(random, torch.get_rng_state())


def test_table_names_rule_sites_edit_new_parameters_and_contract() -> None:
    plan = surgery.plan(stack(), lora(where=Path("*.up"), id="ups"))
    text = str(plan)
    assert "ups" in text
    assert "{0..3}.up" in text
    assert "(4 sites)" in text
    assert "exact" in text
    # rank 2: 4 layers of A (2, 8) and B (16, 2)
    assert plan.totals.added == 4 * (2 * 8 + 16 * 2) == 192
    assert "192" in text
    assert plan.totals.trainable == 192
    assert plan.totals.added_bytes == 4 * 192


def test_full_view_has_one_row_per_site() -> None:
    from surgery.table import render

    plan = surgery.plan(stack(), lora(where=Path("*.up")))
    assert all(f"{index}.up" in render(plan.view(full=True)) for index in range(4))


def test_totals_predicted_are_the_totals_found() -> None:
    model = stack()
    plan = surgery.plan(model, lora(where=Type("Linear")))
    totals = plan.totals
    plan.apply()
    assert plan.totals == totals
    found = list(model.parameters())
    assert sum(p.numel() for p in found) == totals.parameters + totals.added
    assert sum(p.numel() for p in found if p.requires_grad) == totals.trainable


def test_json_lists_every_edit() -> None:
    plan = surgery.plan(stack(), lora(where=Path("*.down")))
    data = json.loads(json.dumps(plan.to_dict()))
    assert [edit["site"] for edit in data["edits"]] == [f"{i}.down" for i in range(4)]
    assert data["totals"]["added"] == plan.totals.added
    assert data["contract"] == "exact"


def test_no_match_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(NoMatch, match=r"(?s)rule 'typo' .*matched nothing.*0\.up.*optional: true"):
        surgery.plan(stack(), lora(where=Path("*.upp"), id="typo"))


def test_optional_rule_may_match_nothing_and_the_plan_says_so() -> None:
    rules = [
        Rule(LowRank(rank=2), where=Path("*.absent"), id="maybe", optional=True),
        lora(where=Path("*.up")),
    ]
    plan = surgery.plan(stack(), rules)
    assert plan.unmatched == ("maybe",)
    assert "optional rule 'maybe' matched nothing" in str(plan)
    assert len(plan.edits) == 4


def test_accidental_partial_match_is_warned_about_with_the_layer_and_why() -> None:
    model = stack(6)
    model[4].up = nn.Identity()
    plan = surgery.plan(model, lora(where=Path("*.up")))
    assert len(plan.warnings) == 1
    assert "4" in plan.warnings[0]
    assert "warning:" in str(plan)
    deliberate = surgery.plan(stack(6), lora(where=Path("*.up") & Layers("-2:")))
    assert deliberate.warnings == ()


def test_two_rules_on_one_site_name_both_and_the_site() -> None:
    rules = [lora(where=Path("*.up"), id="one"), lora(where=Path("0.*"), id="two")]
    model = stack()
    with pytest.raises(Conflict, match=r"'one' and 'two' both change .*0\.up"):
        surgery.plan(model, rules)


def test_two_adapters_of_different_names_share_a_site() -> None:
    rules = [lora(where=Path("*.up"), id="one"), lora(where=Path("*.up"), adapter="b", id="two")]
    assert len(surgery.plan(stack(), rules).edits) == 8


def test_second_application_of_the_same_rule_is_a_conflict() -> None:
    model = stack()
    surgery.apply(model, lora(where=Path("*.up"), id="one"))
    before = state(model)
    with pytest.raises(Conflict, match=r"(?s)was applied to this model before.*undo"):
        surgery.plan(model, lora(where=Path("*.up"), id="again"))
    assert_same(before, state(model))


def test_plan_is_applied_once_and_only_to_the_model_it_saw() -> None:
    model = stack()
    plan = surgery.plan(model, lora(where=Path("*.up")))
    plan.apply()
    with pytest.raises(ModelStateError, match="changed since this plan was made"):
        plan.apply()
    other = surgery.plan(model, lora(where=Path("*.down"), adapter="b"))
    model[0].down = nn.Linear(4, 8)
    with pytest.raises(ModelStateError, match="changed since this plan was made"):
        other.apply()


def test_error_while_planning_a_later_rule_leaves_no_trace() -> None:
    model = stack()
    before = state(model)
    with pytest.raises(RuleError, match=r"rule 'huge'.*rank 99"):
        surgery.plan(
            model, [lora(where=Path("*.up")), lora(where=Path("*.down"), rank=99, id="huge")]
        )
    assert_same(before, state(model))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (3, "expected a recipe, received int"),
        ([], "expected a recipe, received list"),
        ([LowRank()], "expected a recipe, received list"),
        ("no-such-file.yaml", "there is no such file"),
    ],
)
def test_what_is_not_a_recipe(recipe: Any, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        surgery.plan(stack(), recipe)


def test_what_is_not_a_model() -> None:
    with pytest.raises(ModelStateError, match=r"expected an nn\.Module, received str"):
        surgery.plan("timm:resnet18", lora())  # type: ignore[arg-type]


def test_copy_leaves_the_original_alone() -> None:
    model = stack()
    before = state(model)
    rewritten = surgery.apply(model, lora(where=Path("*.up")), copy=True)
    assert_same(before, state(model))
    assert record_of(model) is None
    assert record_of(rewritten) is not None
    assert rewritten is not model
    with torch.no_grad():
        for p in rewritten.parameters():
            p.zero_()
    assert_same(before, state(model))


def test_created_by_names_what_an_earlier_rule_makes_and_lowrank_says_why_not() -> None:
    rules = [
        lora(where=Path("*.up"), id="first"),
        Rule(LowRank(rank=2), where=surgery.CreatedBy("first"), id="second"),
    ]
    with pytest.raises(NoMatch, match=r"(?s)rule 'second'.*0\.up\.lowrank"):
        surgery.plan(stack(), rules)


def test_meta_model_is_planned_and_applied_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*[Block(1 << 20) for _ in range(3)])
    plan = surgery.plan(model, lora(where=Type("Linear"), rank=4))
    plan.apply()
    assert all(p.is_meta for p in model.parameters())
    assert model[0].up.lowrank.default.lora_B.shape == (1 << 20, 4)


def test_recipe_of_one_rule_equals_the_rule() -> None:
    rule = lora(where=Path("*.up"))
    one, two = surgery.plan(stack(), rule), surgery.plan(stack(), Recipe(rules=[rule]))
    assert one.to_dict() == two.to_dict()


def test_same_seed_same_start_whatever_the_order_of_rules() -> None:
    first, second = stack(), stack()
    surgery.apply(first, [lora(where=Path("*.up")), lora(where=Path("*.down"))])
    surgery.apply(second, [lora(where=Path("*.down")), lora(where=Path("*.up"))])
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    third = stack()
    rules = [lora(where=Path("*.up")), lora(where=Path("*.down"))]
    surgery.apply(third, Recipe(rules=rules, seed=1))
    name = "0.up.lowrank.default.lora_A"
    assert not torch.equal(third.state_dict()[name], one[name])


def test_plan_survives_a_deepcopy_of_the_model() -> None:
    model = stack()
    surgery.apply(model, lora(where=Path("*.up")))
    clone = copy.deepcopy(model)
    surgery.undo(clone)
    assert record_of(model) is not None
    assert record_of(clone) is None
