"""Profiles of hypothesis: ``ci``, short and always the same; ``long``, 30 minutes with new examples (`make fuzz`)."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.errors import InvalidArgument

LONG_SECONDS = 30 * 60.0
"""How long all fuzz tests together take in the profile ``long``."""

_BASE = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))

settings.register_profile("ci", _BASE, derandomize=True)
settings.register_profile("long", _BASE, derandomize=False, print_blob=True)

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")


def _is_fuzz_test(item: pytest.Item) -> bool:
    return item.path.parent == Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the fuzz tests the profile, and only them: loading it would change the tests of all other folders, too."""
    functions = {item.function for item in items if isinstance(item, pytest.Function) and _is_fuzz_test(item)}
    for function in functions:
        if hasattr(function, "hypothesis"):
            with suppress(InvalidArgument):  # it has settings of its own
                settings.get_profile(PROFILE)(function)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Repeat a test for its share of the time in the profile ``long``; hypothesis itself counts examples only."""
    if PROFILE != "long" or not _is_fuzz_test(pyfuncitem):
        return None
    num_tests = sum(map(_is_fuzz_test, pyfuncitem.session.items))
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    end = time.monotonic() + LONG_SECONDS / num_tests
    while time.monotonic() < end:
        pyfuncitem.obj(**arguments)
    return True
