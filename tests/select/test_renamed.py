"""Roles come from structure: with every name replaced, the same sites play the same roles."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery.select import ModelMap
from tests.select.families import FAMILIES, example

SOURCE = Path(__file__).with_name("families.py")

# Family → attribute of the innermost module that holds it → role. What is not named has none.
EXPECTED: dict[str, dict[str, str]] = {
    "llama": {
        "embed_tokens": "embed.token",
        "q_proj": "attention.q",
        "k_proj": "attention.k",
        "v_proj": "attention.v",
        "o_proj": "attention.out",
        "q_norm": "norm",
        "gate_proj": "mlp.gate",
        "up_proj": "mlp.in",
        "down_proj": "mlp.out",
        "input_norm": "norm",
        "post_norm": "norm",
        "last_norm": "norm",
        "lm_head": "head",
    },
    "bert": {
        "word_embeddings": "embed.token",
        "position_embeddings": "embed.position",
        "type_embeddings": "embed.type",
        "embedding_norm": "norm",
        "query": "attention.q",
        "key": "attention.k",
        "value": "attention.v",
        "attention_out": "attention.out",
        "attention_norm": "norm",
        "intermediate": "mlp.in",
        "shrink": "mlp.out",
        "shrink_norm": "norm",
        "pooler": "head",
    },
    "vit": {
        "patches": "embed.patch",
        "class_token": "embed.learned",
        "positions": "embed.position",
        "qkv": "attention.qkv",
        "proj": "attention.out",
        "first_norm": "norm",
        "second_norm": "norm",
        "last_norm": "norm",
        "first_scale": "scale",
        "widen": "mlp.in",
        "narrow": "mlp.out",
        "classifier": "head",
    },
    "mixture": {
        "embed": "embed.token",
        "qkv": "attention.qkv",
        "proj": "attention.out",
        "norm": "norm",
        "route": "router",
        "gate_up": "mlp.gate_in",
        "down": "mlp.out",
        "head": "head",
    },
    "dit": {
        "enter": "embed.input",
        "time_in": "conditioning",
        "time_out": "conditioning",
        "steer": "modulation",
        "norm": "norm",
        "qkv": "attention.qkv",
        "proj": "attention.out",
        "leave": "head",
    },
    "conv": {
        "stem": "conv",
        "depthwise": "conv",
        "norm": "norm",
        "widen": "mlp.in",
        "narrow": "mlp.out",
        "squeeze": "conv",
        "excite": "conv",
        "classifier": "head",
    },
}


def attributes_of(models: list[nn.Module]) -> list[str]:
    """Every name under which one of the models' own classes holds a module or a parameter."""
    names: dict[str, None] = {}
    for model in models:
        for module in model.modules():
            if not type(module).__module__.startswith("torch."):
                names |= dict.fromkeys((*module._modules, *module._parameters))
    return [name for name in names if not name.isdigit()]


class Renamer(ast.NodeTransformer):
    """Replaces attributes, wherever they are read or set, and the names of classes."""

    def __init__(self, attributes: dict[str, str], classes: dict[str, str]) -> None:
        self.attributes = attributes
        self.classes = classes

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            node.attr = self.attributes.get(node.attr, node.attr)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.name = self.classes[node.name]
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.classes.get(node.id, node.id)
        return node


def renamed() -> tuple[dict[str, type[nn.Module]], dict[str, str]]:
    """The families from rewritten source, and what each attribute is called in them."""
    tree = ast.parse(SOURCE.read_text())
    attributes = {
        name: f"m{at}"
        for at, name in enumerate(attributes_of([made() for made in FAMILIES.values()]))
    }
    classes = {
        node.name: f"C{at}"
        for at, node in enumerate(n for n in tree.body if isinstance(n, ast.ClassDef))
    }
    code = ast.fix_missing_locations(Renamer(attributes, classes).visit(tree))
    namespace: dict[str, Any] = {"__name__": "renamed_families"}
    exec(compile(code, str(SOURCE), "exec"), namespace)  # noqa: S102 - this repository's own file
    return namespace["FAMILIES"], attributes


def roles(model: nn.Module, family: str) -> dict[str, str | None]:
    found = ModelMap(model.eval(), example(family))
    return {site.path: found.role(site).name for site in found.sites if site.weight is not None} | {
        path: role.name for path, role in found.roles.items() if role.name
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_a_family(family: str):
    found = roles(FAMILIES[family](), family)
    named = {path: EXPECTED[family].get(path.rpartition(".")[2]) for path in found}
    assert found == named
    assert {path.rpartition(".")[2] for path in found} == set(EXPECTED[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_survive_renaming_everything(family: str):
    families, attributes = renamed()
    torch.manual_seed(0)
    stock = FAMILIES[family]().eval()
    torch.manual_seed(0)
    other = families[family]().eval()
    given = example(family)
    expected, made = stock(*given), other(*given)
    pairs = zip(expected, made, strict=True) if isinstance(made, tuple) else [(expected, made)]
    assert all(torch.equal(a, b) for a, b in pairs), "the renamed copy is another model"

    def translate(path: str) -> str:
        return ".".join(attributes.get(part, part) for part in path.split("."))

    assert roles(other, family) == {translate(p): r for p, r in roles(stock, family).items()}
