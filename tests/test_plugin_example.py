"""The package that CONTRIBUTING.md walks through, installed by pip and used as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch, surgery
from torch import nn
from surgery.sources import Example

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).double()
x = torch.randn(3, 6, dtype=torch.float64)
before = model(x)
recipe = surgery.Recipe.loads(sys.argv[1])
surgery.apply(model, recipe, example=x)
assert torch.equal(model(x), before)
assert surgery.verify(model, example=x).ok
with torch.no_grad():
    model[0].output_scale.normal_()
    model[2].output_scale.normal_()
hidden = nn.functional.gelu((x @ model[0].weight.T + model[0].bias) * model[0].output_scale)
expected = (hidden @ model[2].weight.T + model[2].bias) * model[2].output_scale
# Two orders of summation in float64, eight terms: 1e-12 is some thousand roundings.
torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
assert not torch.equal(model(x), before)
surgery.save(model, sys.argv[2])
stock = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).double()
again = surgery.restore(sys.argv[2], model=stock)
assert torch.equal(again(x), model(x))
surgery.undo(model)
assert torch.equal(model(x), before)
assert type(model[0]) is nn.Linear
assert "output_scale" not in dict(model[0].named_parameters())
"""
RULES = """
version: 1
recipe: scaled-outputs
rules:
  - pass: output-scale
    where: {path: "**"}
    with: {init: 1.0}
"""


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example package is installed."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    source = root / "tests" / "plugin_example"
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--target", str(folder), str(source)],
        check=True,
    )
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{root}"}


def run(environment: dict[str, str], *args: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plugin_is_listed(installed: dict[str, str]):
    listed = json.loads(run(installed, "-m", "surgery.cli", "list", "passes", "--json"))
    assert {"name": "output-scale", "origin": "surgery_output_scale:OutputScale"} in listed[
        "passes"
    ]


def test_the_plugin_rewrites_verifies_saves_and_undoes(installed: dict[str, str], tmp_path: Path):
    run(installed, "-c", SCRIPT, RULES, str(tmp_path / "saved"))


def test_its_options_are_checked(installed: dict[str, str]):
    script = "import sys, surgery; surgery.Recipe.loads(sys.argv[1])"
    wrong = RULES.replace("init: 1.0", "initial: 1.0")
    done = subprocess.run(
        [sys.executable, "-c", script, wrong],
        env=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "init" in done.stderr
    assert "RuleError" in done.stderr
