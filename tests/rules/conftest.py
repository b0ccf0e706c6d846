"""Makes the passes of ``samples`` known to the registry while the tests of this folder run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from surgery import registry
from tests.rules import samples

# The time of one example says more about what else runs on the machine than about the code.
settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any-machine")


@pytest.fixture(autouse=True, scope="module")
def _passes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for name, cls in samples.PASSES.items():
            patched.setitem(registry.PASSES._builtin, name, f"tests.rules.samples:{cls.__name__}")
        yield
        for name in samples.PASSES:
            registry.PASSES._loaded.pop(name, None)
