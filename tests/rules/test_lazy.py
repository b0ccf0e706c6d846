from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from surgery import rules

# What `import surgery` must not pay for; see the import budget in the design.
SCRIPT = """
import sys
import surgery.rules, surgery.rules.match, surgery.rules.roles
heavy = {"pydantic", "pydantic_core", "ruamel", "ruamel.yaml"} & sys.modules.keys()
assert not heavy, heavy
from surgery.rules import Recipe
assert "pydantic" in sys.modules
assert "ruamel.yaml" not in sys.modules
"""


def test_pydantic_and_the_yaml_parser_are_imported_when_used(root: Path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists():
    assert all(getattr(rules, name).__doc__ for name in rules.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'surgery\.rules' has no attribute 'Recpie'"):
        rules.Recpie  # noqa: B018
