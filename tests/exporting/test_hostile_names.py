"""A generated file is the same code whatever modules, tensors, recipes and options are called."""

from __future__ import annotations

import ast
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import surgery
from surgery.checkpoints.sharded import open_checkpoint
from surgery.exporting.code.text import Code, literal
from surgery.exporting.python import Python
from surgery.exporting.remote import rewritten_name
from surgery.exporting.weights import write_weights
from surgery.sources import Example
from tests.exporting import models
from tests.exporting.named import Named

BREAKOUT = [
    '"""\nimport os; os.system("x")\n"""',
    "'''\nraise SystemExit\n'''",
    "x'); __import__('os').system('x'); ('",
    'x"); __import__("os").system("x"); ("',
    "\\",
    "\\'",
    "{0.__class__}",
    "{model}",
    "%s",
    "#",
    "\n",
    "\r\nimport os",
    "\u2028import os",
    "\x85import os",
    "\x0cimport os",
    "\0",
    "\x1b[2J",
    "é\u202e",
    "# type: ignore\nimport os",
    "__import__",
    "class",
    " ",
]
#: Those that are in no file by chance, and not in a literal either.
LONG = frozenset(word for word in BREAKOUT if len(word) > 8 and "\n" in word)
TEXT = st.one_of(
    st.sampled_from(BREAKOUT),
    st.text(alphabet=st.sampled_from("ab_'\"\\\n\r{}();#\t\u2028\0é%$ "), min_size=1, max_size=10),
)
#: A module's name may hold anything but a dot, and must not be an attribute of its holder.
NAMES = st.lists(
    TEXT.map(lambda text: text.replace(".", "·")).filter(lambda name: not hasattr(dict, name)),
    min_size=3,
    max_size=3,
    unique=True,
)
BENIGN = ["one", "two", "three"]


def code_of(names: list[str], label: str, recipe: str, work: Path) -> str:
    """The file of a model with adapters, a frozen rest, and such names in it."""
    torch.manual_seed(0)
    model = Named(names, label)
    rules = [
        surgery.Rule(surgery.LowRank(rank=2), where=surgery.Type("Linear")),
    ]
    surgery.apply(model, surgery.Recipe(rules=rules, recipe=recipe))
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    writer = Python(arguments={"names": names, "label": label})
    writer.write(models.stirred(model).eval(), work, Example((torch.ones(1, 4),), {}))
    return (work / "model.py").read_text(encoding="utf-8")


class _Blank(ast.NodeTransformer):
    """Takes the text out of strings."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("") if isinstance(node.value, str) else node


def shape(text: str) -> str:
    """What a file does, whatever its strings say; comments do not count."""
    return ast.dump(_Blank().visit(ast.parse(text)))


@pytest.fixture(scope="module")
def benign(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = code_of(BENIGN, "label", "recipe", tmp_path_factory.mktemp("benign") / "out")
    assert all(repr(word) in text for word in ("label", "two"))
    return shape(text)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # a case takes long: what is found is told as it is
)
@given(NAMES, TEXT, TEXT)
@example([BREAKOUT[0], "b", "c"], BREAKOUT[1], BREAKOUT[2])
@example(['x"]; import os; ["', "b", "c"], "\u2028", "\n")
def test_names_change_nothing_but_strings(
    benign: str, tmp_path_factory: pytest.TempPathFactory, names: list[str], label: str, recipe: str
) -> None:
    work = tmp_path_factory.getbasetemp() / "hostile"
    text = code_of([name.replace(".", "·") for name in names], label, recipe, work)
    assert shape(text) == benign
    # A comment could hold text that is no string: there is none that came along.
    assert all(word not in text for word in (*names, label, recipe) if word in LONG)


@given(TEXT.filter(lambda name: "\0" not in name), TEXT)  # Python itself refuses that one
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_class_of_another_name_is_no_code(name: str, word: str) -> None:
    """Names of classes stand in code as they are: what is no name is refused."""
    made = type(str(name), (torch.nn.Linear,), {"__module__": "torch.nn"})
    nothing: Any = SimpleNamespace(any=False)
    for action in (rewritten_name, Code(nothing).stock):
        with suppress(surgery.ExportError):
            assert action(made).isidentifier()
    assert ast.literal_eval(literal({word: [name, (word,)]})) == {word: [name, (word,)]}


def test_names_of_tensors_stay_in_the_header(tmp_path: Path) -> None:
    model = Named([text.replace(".", "·") for text in BREAKOUT])
    write_weights(model, tmp_path, "model", frozenset(), "5GB")
    assert set(open_checkpoint(tmp_path).tensors) == set(model.state_dict())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.safetensors"]
