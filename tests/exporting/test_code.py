"""Generated files: nothing of a checkpoint or a rule file gets into them as code."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from architectures import adapters, shortcuts
from architectures.shortcuts import kernels
from surgery.exporting.code import runtime
from surgery.exporting.code.inline import Inlined, is_copied
from surgery.exporting.code.literals import identifier, literal
from surgery.exporting.code.rewrites import Adapted, Rewired, Rewrites, rewrites_of
from surgery.exporting.code.text import Code
from surgery.passes.streams import Stream
from tests.exporting import models

HOSTILE = st.text(alphabet=st.sampled_from("a0_.'\"\\\n{}();#\r\t\u2028\0é"), max_size=12)


@given(HOSTILE)
def test_a_literal_is_the_value_and_nothing_else(text: str) -> None:
    assert ast.literal_eval(literal(text)) == text
    assert isinstance(ast.parse(literal(text), mode="eval").body, ast.Constant)


@given(HOSTILE)
def test_an_identifier_is_one_or_refused(text: str) -> None:
    try:
        name = identifier(text)
    except surgery.ExportError:
        return
    assert isinstance(ast.parse(name, mode="eval").body, ast.Name)


@pytest.mark.parametrize("value", [nn.Linear(1, 1), float("nan"), object])
def test_what_is_no_literal_is_refused(value: Any) -> None:
    with pytest.raises(surgery.ExportError, match="cannot be written"):
        literal(value)


@functools.cache
def rewrites() -> Rewrites:
    return rewrites_of(models.rewired("mlp"))


@settings(max_examples=100, deadline=None)
@given(HOSTILE, HOSTILE, HOSTILE)
def test_names_of_modules_and_arguments_stay_strings(holder: str, member: str, word: str) -> None:
    found = rewrites()
    one = found.shortcuts[0]
    one.segment.members = (member, *one.segment.members[1:])
    one.segment.streams = (Stream(0, word),)
    changed = Rewired(holder, member, one.segment, one.arguments)
    code = Code(Rewrites(found.classes, (changed,)))
    rewrite = ast.parse(code.rewrite()).body[-1]
    assert isinstance(rewrite, ast.FunctionDef)
    called = {
        node.func.id
        for node in ast.walk(rewrite)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert called == {"Shortcuts", "Stream", "Ancre"}
    texts = {node.value for node in ast.walk(rewrite) if isinstance(node, ast.Constant)}
    assert {holder, member, word} <= texts


@functools.cache
def adapted() -> Rewrites:
    return rewrites_of(models.adapted(models.stock("mlp"), method="pissa"))


@settings(max_examples=100, deadline=None)
@given(HOSTILE, HOSTILE)
def test_names_of_adapters_and_weights_stay_strings(path: str, word: str) -> None:
    found = adapted()
    one = found.adapted[0]
    one.bank.parameter = word
    one.bank.active = ((word, 1.0),)
    changed = Adapted((path,), one.bank, True, one.dtype)
    again = Rewrites(found.classes, adapted=(changed,), trained=frozenset({word}))
    rewrite = ast.parse(Code(again).rewrite()).body[-1]
    called = {
        node.func.id
        for node in ast.walk(rewrite)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert called == {"Matrix", "PiSSA", "Bank", "attach", "train_adapters"}
    texts = {node.value for node in ast.walk(rewrite) if isinstance(node, ast.Constant)}
    assert {path, word} <= texts | {""}


def test_a_text_has_what_it_needs() -> None:
    inlined = Inlined()
    inlined.add("architectures.shortcuts.ancre", "Ancre")
    inlined.add("architectures.shortcuts.ancre", "Ancre")
    names: dict[str, Any] = {"__name__": "made"}
    text = f"from __future__ import annotations\n{inlined.text()}"
    exec(compile(text, "<made>", "exec", dont_inherit=True), names)  # noqa: S102
    assert names["Ancre"](3)().shape == (3, 3)
    assert not names["Ancre"].__module__.startswith("architectures")


def test_what_is_evaluated_at_once_stands_above() -> None:
    # Adapter and Method name each other, one in an annotation and one as a base.
    inlined = Inlined()
    inlined.add("architectures.adapters", "Adapter")
    inlined.add("architectures.adapters", "PiSSA")
    text = inlined.text()
    bases = ["class Adapter(", "class Method(", "class LoRA(", "class PiSSA("]
    places = [text.index(base) for base in bases]
    assert places == sorted(places)


def test_definitions_that_are_copied_together_have_names_of_their_own() -> None:
    homes: dict[str, set[str]] = {}
    for package in (shortcuts, adapters, kernels):
        for name in Path(str(package.__file__)).parent.glob("*.py"):
            for node in ast.parse(name.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    homes.setdefault(node.name, set()).add(name.name)
    # The other kernels, and histories, are what the plain kernel stands in for.
    left_out = {"__init__.py", "fused.py", "blocked.py", "history.py"}
    twice = {name: files - left_out for name, files in homes.items()}
    assert {name: files for name, files in twice.items() if len(files) > 1} == {}


def test_two_things_of_one_name_are_refused() -> None:
    inlined = Inlined()
    inlined.add("collections", "Counter")
    inlined.add("collections", "Counter")
    with pytest.raises(surgery.ExportError, match="two different things are called 'Counter'"):
        inlined.claim("Counter", object())


def test_libraries_are_imported_and_the_rest_is_copied() -> None:
    assert not any(map(is_copied, ("torch.nn", "timm.models", "ast", "transformers")))
    assert all(map(is_copied, ("surgery.tree", "architectures.backbones", "somebody.elses")))


def test_shared_modules_are_in_a_state_dict_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    runtime.share(model, {"1": "0"})
    assert model[1] is model[0]
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    assert set(state) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    model.load_state_dict(state)
    assert not model[1].weight.any()
