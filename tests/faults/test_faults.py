"""Saves, exports and conversions that are killed, or run into a disk that is full or read-only.

The source is never touched; the output is the old one or the new one, whole, or is not there; and
the next run goes through. ``make faults`` kills each at 20 random points, ``make test`` at a few.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and capabilities")

POINTS = int(os.environ.get("FAULT_POINTS", "4"))
OPERATIONS = ("save", "export", "convert")
REFUSED = 3

Told = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def told(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What the driver found, in a process of its own that may fork."""
    parent = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.faults.driver", str(parent), str(POINTS)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=root, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_random_points(operation: str, told: Told) -> None:
    found = told[operation]["kill"]
    assert found["points"] == POINTS
    assert found["steps"] > 10
    # Some kills came before the exchange: otherwise nothing was shown.
    assert found["seen"].get("absent", 0) + found["seen"].get("old", 0) > 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_error_of_the_file_system(operation: str, told: Told) -> None:
    assert sum(told[operation]["error"]["seen"].values()) >= 2


@pytest.mark.parametrize("fault", ["full", "readonly"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_refused(operation: str, fault: str, told: Told) -> None:
    assert told[operation][fault]["codes"] == [REFUSED, REFUSED]


def test_a_source_that_changes_meanwhile(told: Told) -> None:
    assert told["convert"]["source"]["codes"] == [REFUSED, REFUSED]


@pytest.mark.skipif(POINTS < 20, reason="make faults")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_disk_without_room(operation: str, told: Told) -> None:
    found = told[operation]["tmpfs"]
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["codes"] == [REFUSED]
