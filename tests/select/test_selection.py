"""Which sites a condition selects, why the others are left out, near misses and partial matches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.capture.graft import graft
from surgery.errors import SourceError
from surgery.rules import Where
from surgery.select import Match, ModelMap, Selection, Site, select
from tests import zoo


def linear(site: Site) -> Match:
    """What an adapter accepts: linear layers and bare matrices."""
    if isinstance(site.module, nn.Linear) or site.parameter is not None:
        return Match.yes(f"lowrank adapts {site.what}")
    return Match.no(f"lowrank cannot adapt {site.what}")


def anything(site: Site) -> Match:
    return Match.yes("anything goes")


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)


class Layer(nn.Module):
    def __init__(self, width: int = 4, wide: int = 8) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, wide)
        self.down = nn.Linear(wide, width)


class Model(nn.Module):
    def __init__(self, layers: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(layers or [Layer() for _ in range(4)])
        self.head = nn.Linear(4, 10)


def paths(found: Selection) -> list[str]:
    return [site.path for site in found.matched]


def chosen(where: dict[str, Any] | None, except_: dict[str, Any] | None = None) -> Selection:
    return select(
        ModelMap(Model()),
        None if where is None else Where(**where),
        None if except_ is None else Where(**except_),
        linear,
    )


ALL = [
    f"layers.{n}.{name}"
    for n in range(4)
    for name in ("attention.query", "attention.value", "up", "down")
]
CASES: list[tuple[dict[str, Any] | None, dict[str, Any] | None, list[str]]] = [
    (None, None, [*ALL, "head"]),
    ({"path": "layers.**"}, None, ALL),
    ({"path": "layers.{0,3}.up"}, None, ["layers.0.up", "layers.3.up"]),
    ({"path": r"re:.*\.[13]\.down"}, None, ["layers.1.down", "layers.3.down"]),
    ({"path": ["head", "layers.0.up"]}, None, ["layers.0.up", "head"]),
    ({"type": "Linear"}, None, [*ALL, "head"]),
    ({"type": "torch.nn.Linear", "layers": "-1"}, None, ALL[12:]),
    ({"type": ["LayerNorm", "Linear"], "path": "head"}, None, ["head"]),
    ({"layers": "1:3"}, None, ALL[4:12]),
    ({"layers": [0, -1]}, None, [*ALL[:4], *ALL[12:]]),
    ({"stack": "all"}, None, ALL),
    ({"stack": "auto", "path": "**.up"}, None, ALL[2::4]),
    ({"stack": "largest"}, None, ALL),
    ({"stack": "layers", "layers": ":1"}, None, ALL[:4]),
    ({"shape": {"in": ">=8"}}, None, ALL[3::4]),
    ({"shape": {"in": 4, "out": ">4"}}, None, [*ALL[2::4], "head"]),
    ({"shape": [{"out": 10}, {"in": 8}]}, None, [*ALL[3::4], "head"]),
    ({"any": [{"path": "head"}, {"layers": 0}]}, None, [*ALL[:4], "head"]),
    ({"not": {"path": "layers.**"}}, None, ["head"]),
    ({"type": "Linear", "not": {"any": [{"path": "head"}, {"layers": "1:"}]}}, None, ALL[:4]),
    ({"type": "Linear"}, {"path": "layers.**"}, ["head"]),
    ({"type": "Linear"}, {"layers": "::2"}, [*ALL[4:8], *ALL[12:], "head"]),
    ({"type": "Linear"}, {"shape": {"out": ">=8"}}, [p for p in ALL if not p.endswith("up")]),
    ({"type": "Layer"}, None, []),
    ({"created_by": "earlier"}, None, []),
]


@pytest.mark.parametrize(("where", "except_", "expected"), CASES)
def test_selection(where: Any, except_: Any, expected: list[str]):
    assert paths(chosen(where, except_)) == expected


@pytest.mark.parametrize(("where", "except_", "expected"), CASES)
def test_every_site_considered_has_its_reason(where: Any, except_: Any, expected: list[str]):
    found = chosen(where, except_)
    assert {path for path, match in found.considered.items() if match.ok} == set(expected)
    assert all(match.reason for match in found.considered.values())
    assert all((match.distance == 0) == match.ok for match in found.considered.values())


REASONS: list[tuple[dict[str, Any], str, str, str | None]] = [
    ({"path": "head"}, "embed", "path does not match 'head'", "path"),
    ({"type": "LayerNorm"}, "head", "it is a Linear, not LayerNorm", "type"),
    ({"layers": "2:"}, "layers.1.up", "it is in layer 1 of 4 of layers, not in '2:'", "layers"),
    ({"layers": "2:"}, "head", "it is in no stack of layers", "layers"),
    ({"shape": {"in": ">=8"}}, "layers.0.up", "shape: 'in' is 4, not >=8", "shape"),
    ({"shape": {"in": ">=8"}}, "layers.0", "shape: it has no size 'in'", "shape"),
    ({"path": "layers.0"}, "layers.0", "lowrank cannot adapt Layer", None),
    ({"not": {"path": "head"}}, "head", "not: path matches 'head'", "not"),
    (
        {"created_by": "r"},
        "head",
        "the model came with it, the rule asks for what 'r' made",
        "created_by",
    ),
]


@pytest.mark.parametrize(("where", "path", "reason", "key"), REASONS)
def test_reasons(where: Any, path: str, reason: str, key: str | None):
    answer = chosen(where).considered[path]
    assert (answer.ok, answer.reason, answer.key) == (False, reason, key)


def test_exceptions_say_what_they_matched():
    answer = chosen({"type": "Linear"}, {"path": "head"}).considered["head"]
    assert (answer.reason, answer.key) == ("except: path matches 'head'", "except")


# Condition that matches nothing → the nearest site and words its reason must hold.
NEAR: list[tuple[dict[str, Any], str, str]] = [
    ({"path": "layers.*.attention.qeury"}, "layers.0.attention.query", "does not match"),
    ({"path": "layer.*.attention.query"}, "layers.0.attention.query", "does not match"),
    ({"path": "layers.*.query"}, "layers.0.attention.query", "does not match"),
    ({"path": "re:.*haed"}, "head", "does not match"),
    ({"path": "layers.*.attention"}, "layers.0.attention", "lowrank cannot adapt Attention"),
    ({"type": "LayerNorm"}, "layers.0.norm", "lowrank cannot adapt LayerNorm"),
    ({"type": "Linaer"}, "layers.0.attention.query", "it is a Linear, not Linaer"),
    ({"shape": {"in": "==9"}}, "layers.0.down", "'in' is 8, not ==9"),
    ({"layers": "4:8"}, "layers.0.attention.query", "layer 0 of 4 of layers, not in '4:8'"),
    ({"stack": "layer"}, "layers.0.attention.query", "did you mean 'layers'?"),
]


@pytest.mark.parametrize(("where", "path", "words"), NEAR)
def test_the_nearest_miss_comes_first(where: Any, path: str, words: str):
    near = chosen(where).near
    assert near[0][0] == path
    assert words in near[0][1]
    assert len(near) == len(set(near)) <= 5


def test_near_misses_show_one_of_each_kind():
    """Five sites in five layers that miss alike would say one thing five times."""
    shown = [path for path, _ in chosen({"path": "layers.*.attention.qeury"}).near]
    assert len({path.replace("layers.1", "layers.0") for path in shown}) == len(shown)


def test_the_role_found_beside_the_role_asked_for():
    model, example = zoo.build("timm_vit")
    known = ModelMap(model, example)
    found = select(known, Where(role="attention.q"), None, linear)
    assert paths(found) == []
    assert found.near[0] == (
        "blocks.0.attn.qkv",
        "role is attention.qkv, the rule asks for 'attention.q'",
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [("timm_vit", 3), ("llama", 12), ("gpt2", 3), ("UNet2DConditionModel", 36)],
)
def test_one_rule_fits_fused_and_separate_projections(name: str, count: int):
    found = select(ModelMap(*zoo.build(name)), Where(role="attention.qkv"), None, anything)
    assert len(found.matched) == count


def test_a_layer_with_two_roles_is_found_by_either():
    known = ModelMap(*zoo.build("FluxTransformer2DModel"))
    for role in ("attention.out", "mlp.out"):
        found = paths(select(known, Where(role=role), None, linear))
        assert "single_transformer_blocks.0.proj_out" in found


def test_a_model_is_traced_only_if_a_role_decides():
    class Untraceable(Model):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("it was run")

    known = ModelMap(Untraceable(), torch.zeros(1))
    assert paths(select(known, Where(path="head"), None, linear)) == ["head"]
    assert not select(known, Where(path="nowhere", role="head"), None, linear).matched


def test_a_role_without_an_example_is_a_source_error():
    with pytest.raises(SourceError):
        select(ModelMap(Model()), Where(role="head"), None, linear)


def test_types_are_those_of_the_stock_class():
    class Mixin:
        pass

    model = Model()
    graft(model.head, Mixin)
    known = ModelMap(model)
    assert "head" in paths(select(known, Where(type="Linear"), None, linear))
    assert paths(select(known, Where(type="Mixin"), None, linear)) == []
    assert known.by_path["head"].what == "Linear"


def test_a_shared_module_is_found_by_each_of_its_paths():
    shared = nn.Linear(4, 4)
    known = ModelMap(nn.ModuleDict({"a": shared, "b": shared}))
    assert paths(select(known, Where(path="b"), None, linear)) == ["a"]


def test_what_a_rule_made_is_found_only_by_asking_for_it():
    known = ModelMap(Model()).with_created("first", ["head.lowrank.default.lora_A"])
    assert "head.lowrank.default.lora_A" not in paths(select(known, None, None, anything))
    made = select(known, Where(created_by="first"), None, anything)
    assert paths(made) == ["head.lowrank.default.lora_A"]


# -- partial matches ---------------------------------------------------------------------------


def warnings(layers: Sequence[nn.Module], where: dict[str, Any]) -> tuple[str, ...]:
    return select(ModelMap(Model(layers)), Where(**where), None, linear).warnings


def test_a_shape_that_misses_some_layers_is_warned_about():
    layers = [Layer(wide=8 if n % 3 else 6) for n in range(7)]
    assert warnings(layers, {"path": "**.up", "shape": {"out": ">=8"}}) == (
        "layers: up matched in 4 of 7 layers; not in layers 0, 3, 6: shape: 'out' is 6, not >=8",
    )


def test_a_layer_without_the_module_is_warned_about():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 8)
            self.back = nn.Linear(8, 4)

    layers = [Layer(), Plain(), Layer(), Layer(), Plain(), Layer()]
    found = warnings(layers, {"path": "**.attention.query"})
    assert len(found) == 1
    assert "attention.query matched in 4 of 6 layers; not in layers 1, 4: " in found[0]
    assert "there is no such module" in found[0]


def test_a_type_that_misses_some_layers_is_warned_about():
    class Mine(nn.Linear):
        pass

    layers = [Layer() for _ in range(4)]
    layers[2].up = Mine(4, 8)
    for layer in layers:
        layer.norm = nn.Identity()
    found = warnings(layers, {"type": "Mine"})
    assert found == ()  # one of four is no accident
    odd = Layer()
    odd.up = nn.Bilinear(4, 4, 8)  # pyright: ignore[reportAttributeAccessIssue]
    found = warnings([Layer(), Layer(), odd, Layer()], {"type": "Linear"})
    assert found == (
        "layers: up matched in 3 of 4 layers; not in layer 2: it is a Bilinear, not Linear",
    )


DELIBERATE: list[dict[str, Any]] = [
    {"layers": ":3"},
    {"path": "layers.{0,1,2}.**"},
    {"path": "re:layers\\.[0-2]\\..*"},
    {"type": "Linear", "not": {"layers": "-1"}},
    {"type": "Linear"},
]


@pytest.mark.parametrize("where", DELIBERATE)
def test_layers_left_out_on_purpose_are_not_warned_about(where: dict[str, Any]):
    assert warnings([Layer() for _ in range(4)], where) == ()


def test_an_exception_is_on_purpose():
    found = select(ModelMap(Model()), Where(type="Linear"), Where(path="layers.0.**"), linear)
    assert len(found.matched) == 13
    assert found.warnings == ()


# -- speed -------------------------------------------------------------------------------------


def test_selecting_in_a_70b_model_takes_milliseconds():
    """Measured at 30 ms on two busy cores; a hundred times as long means a quadratic walk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=8192,
                intermediate_size=28672,
                num_hidden_layers=80,
                num_attention_heads=64,
                num_key_value_heads=8,
            )
        )
    started = time.perf_counter()
    known = ModelMap(model)
    found = select(known, Where(type="Linear", layers="-8:", shape={"in": ">=256"}), None, linear)
    assert len(found.matched) == 8 * 7
    assert time.perf_counter() - started < 3
