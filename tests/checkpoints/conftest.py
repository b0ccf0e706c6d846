"""The passes of ``tests/verify/rewrites.py``, known for the length of each test."""

from __future__ import annotations

import pytest

from tests.verify import rewrites


@pytest.fixture(autouse=True)
def _known_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    rewrites.register(monkeypatch)
